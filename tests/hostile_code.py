"""Rewards and losses that do what they should not: source texts, and what is said of each.

A reward without `def reward` in it is the body of one. What is said is a pattern that the one error matches; FINE where
there is none, and the values are those of `GOOD`; EITHER where it depends on the machine, and both will do.
"""

FINE, EITHER = "fine", "either"

GOOD = "return [len(c) / 7 for c in completions]"

TIME, MEMORY = "took longer than 1 s and was stopped", "took more than 0.4 GB of memory and was stopped"
NUMBERS, CHANNEL = "did not arrive as 3 finite numbers", "wrote into the channel that its result is sent through"
ENDED = "ended its process with status "
NOT_OURS = "the process that reward .* runs in"


def killed(signal: int) -> str:
    """What is said of a signal."""
    return rf"was killed by signal {signal} \(SIG"


WAITS = {
    "loops": "while True: pass",
    "sleeps": "time.sleep(1e6)",
    "sleeps, and ignores every signal that it can": "for n in range(1, 32):\n    if n not in (9, 19): "
    "signal.signal(n, signal.SIG_IGN)\ntime.sleep(1e6)",
    "sleeps, and catches every exception": "while True:\n    try: time.sleep(1e6)\n    except BaseException: pass",
    "blocks all signals": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))\ntime.sleep(1e6)",
    "waits for an event": "threading.Event().wait()",
    "takes a lock twice": "lock = threading.Lock()\nlock.acquire()\nlock.acquire()",
    "reads an empty pipe": "os.read(os.pipe()[0], 1)",
    "waits for a connection": "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\ns.accept()",
    "waits for a program": "subprocess.run(['sleep', '1000'])",
    "waits for a signal": "signal.pause()",
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "a regular expression without end": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "a power that takes hours, in C": "3 ** (3 ** 40)",
    "hangs at import": "while True: pass\ndef reward(**_): ...",
    "hangs at import, in a thread that it joins": "import threading\nt = threading.Thread(target="
    "threading.Event().wait)\nt.start()\nt.join()\ndef reward(**_): ...",
    "an event loop for ever": "import asyncio\nasyncio.new_event_loop().run_forever()",
    "cancels Python's own watch": "import faulthandler\nfaulthandler.cancel_dump_traceback_later()\ntime.sleep(1e6)",
    "waits for a child that waits": "if os.fork() == 0:\n    time.sleep(1e6)\nos.wait()",
    "an exception whose text has no end": "class E(Exception):\n    def __str__(self):\n"
    "        while True: pass\nraise E",
    "a list that cannot be left": "class L(list):\n    def __iter__(self):\n        while True: yield 1.0\n"
    "    def __del__(self): time.sleep(1e6)\nreturn L([1.0] * 3)",
    "a number that never becomes one": "class F(float):\n    def __float__(self): time.sleep(1e6)\nreturn [F(1)] * 3",
    "a length that never comes": "class L(list):\n    def __len__(self): time.sleep(1e6)\nreturn L([1.0] * 3)",
    "a bound that never comes": "class F(float):\n    def __abs__(self): time.sleep(1e6)\nreturn [F(1)] * 3",
}

ENDS = {
    "leaves with 0": ("os._exit(0)", ENDED + "0"),
    "leaves with 3": ("os._exit(3)", ENDED + "3"),
    "leaves at import": ("import os\nos._exit(0)\ndef reward(**_): ...", ENDED + "0"),
    "leaves in a thread": ("threading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(60)", ENDED + "0"),
    "leaves on a second try only": (
        "def reward(completions, **_):\n    import os\n    if len(completions) < 3: os._exit(0)\n    1 / 0",
        ENDED + "0",
    ),
    "exits": ("sys.exit(0)", "raised SystemExit: 0 at .*hostile.py:3"),
    "exits at import": ("raise SystemExit(0)\ndef reward(**_): ...", "cannot be imported .SystemExit: 0 at .*py:1"),
    "interrupts": ("raise KeyboardInterrupt", "ended its call: it failed with KeyboardInterrupt"),
    "ends a generator": ("raise GeneratorExit", "failed with GeneratorExit"),
    "aborts": ("os.abort()", killed(6)),
    "kills itself": ("os.kill(os.getpid(), 9)", killed(9)),
    "kills its group": ("os.killpg(0, 9)", killed(9)),
    "terminates itself": ("os.kill(os.getpid(), 15)", killed(15)),
    "an alarm": ("signal.setitimer(signal.ITIMER_REAL, 0.01)\ntime.sleep(60)", killed(14)),
    "reads address 0": ("import ctypes\nctypes.string_at(0)", killed(11) + ".*, in .*hostile.py:4"),
    "kills its parent": ("os.kill(os.getppid(), 9)\ntime.sleep(60)", f"{NOT_OURS} was killed by signal 9"),
    "becomes another program": ("os.execv('/bin/true', ['true'])", ENDED + "0"),
    "becomes a program that prints": ("os.execv('/bin/echo', ['echo', '[1.0, 1.0, 1.0]'])", ENDED + "0"),
    "takes its own processor time": (
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
        f"was killed by signal|{TIME}",
    ),
    "goes down too deep": ("def f(): f()\nf()", "raised RecursionError.* at .*hostile.py:3"),
    "goes down as deep as there is memory": (
        "sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        f"{MEMORY}|{TIME}|signal 11|RecursionError|MemoryError",
    ),
}

TAKES = {
    "a large array": ("x = bytearray(2 * 10**9)", MEMORY),
    "a list that grows": ("x = []\nwhile True: x.append('x' * 10**6)", MEMORY),
    "a text that doubles": ("x = 'x'\nwhile True: x += x", f"{MEMORY}|MemoryError"),
    "mapped memory": ("import mmap\nx = mmap.mmap(-1, 2 * 10**9)\nx.write(b'x' * 10**9)", MEMORY),
    "counts to the end": ("list(iter(int, 1))", f"{MEMORY}|{TIME}"),
    "memory of its children": (
        "for _ in range(8):\n    if os.fork() == 0:\n        x = bytearray(150 * 10**6)\n        time.sleep(60)\n"
        "time.sleep(60)",
        MEMORY,
    ),
    "memory at import": ("x = b'x' * (2 * 10**9)\ndef reward(**_): ...", MEMORY),
    "more than there is": ("x = bytearray(10**17)", "raised MemoryError"),
    "all descriptors": ("x = [open('/dev/null') for _ in range(10**7)]", f"raised OSError|{MEMORY}|{TIME}"),
    "no address space": (f"import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))\n{GOOD}", EITHER),
}

SAYS = {
    "prints for ever": ("while True: print('x' * 1000)", "printed without end|" + TIME),
    "prints for ever, to stderr": ("while True: os.write(2, b'x' * 65536)", "printed without end"),
    "prints for ever, without a line": ("while True: sys.stdout.write('x')", f"printed without end|{TIME}"),
    "prints for ever, in a child": (
        "if os.fork() == 0:\n    while True: os.write(1, b'x' * 65536)\ntime.sleep(60)",
        "printed without end",
    ),
    "prints much": (f"print('x' * 10**7)\n{GOOD}", FINE),
    "prints what a terminal obeys": (f"print('\\x1b[2J\\x1b]0;owned\\x07')\n{GOOD}", FINE),
    "prints bytes that are no text": (f"os.write(1, bytes(range(256)) * 100)\n{GOOD}", FINE),
    "prints half a character": (f"print(chr(0xdcff))\n{GOOD}", FINE),
    "reads from nobody": ("input('password: ')", "raised EOFError"),
    "garbage into the channel": (f"os.write(3, b'garbage')\n{GOOD}", CHANNEL),
    "much garbage into the channel": ("while True: os.write(3, b'x' * 65536)", CHANNEL),
    "an answer of its own": ("os.write(3, b'+[1.0, 1.0, 1.0]')\nos._exit(0)", CHANNEL),
    "garbage into every descriptor": (
        f"for n in range(64):\n    try: os.write(n, b'garbage')\n    except OSError: pass\n{GOOD}",
        CHANNEL,
    ),
    "garbage into its parent's descriptors": (
        "for n in os.listdir(f'/proc/{os.getppid()}/fd'):\n"
        "    try: os.write(os.open(f'/proc/{os.getppid()}/fd/{n}', os.O_WRONLY | os.O_NONBLOCK), b'garbage\\n')\n"
        f"    except OSError: pass\n{GOOD}",
        CHANNEL,
    ),
    "the channel closed": (f"os.close(3)\n{GOOD}", ENDED + "1"),
    "everything closed": (f"os.closerange(0, 4096)\n{GOOD}", "ended its process with status|raised OSError"),
    "the channel led elsewhere": (f"os.dup2(1, 3)\n{GOOD}", ENDED + "0"),
    "stdout closed": (f"os.close(1)\nos.close(2)\n{GOOD}", EITHER),
    "no stdout at all": (f"sys.stdout = sys.stderr = None\n{GOOD}", FINE),
    "says it in an error": ("raise ValueError('\\x1b[2J' + 'x' * 10**8)", "raised ValueError"),
    "an error that cannot be told": (
        "class E(Exception):\n    def __str__(self): raise self\nraise E",
        "ended its call|ended its process|raised E",
    ),
    "our own error": (
        "from entropy_core.errors import StoreError\nraise StoreError('all is lost\\n' * 99)",
        "all is lost",
    ),
    "an error of a thousand": ("raise ExceptionGroup('many', [ValueError(i) for i in range(1000)])", "ExceptionGroup"),
}

CHANGES = {
    "the working directory": "os.chdir('/')",
    "the environment": "os.environ.clear()\nos.environ['CUDA_VISIBLE_DEVICES'] = '-1'",
    "the umask": "os.umask(0o777)",
    "the priority": "os.nice(5)",
    "its cores": "getattr(os, 'sched_setaffinity', lambda *_: None)(0, {min(os.sched_getaffinity(0))})",
    "signal handlers": "signal.signal(signal.SIGINT, signal.SIG_IGN)\nsignal.signal(signal.SIGTERM, print)",
    "the global generator": "import random\nrandom.seed(0)",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
    "a limit on files": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))",
    "the path of modules": "sys.path.clear()\nsys.meta_path.clear()",
    "our own modules": "import entropy_core.rewards.functions as f\nf.REWARDS.clear()\nf.exact_match = None",
    "decimal, locale and warnings": "import decimal, warnings\ndecimal.getcontext().prec = 1\n"
    "warnings.simplefilter('error')",
    "the collector and the tracer": "import gc\ngc.disable()\nsys.settrace(lambda *_: None)\n"
    "sys.setswitchinterval(1e-6)",
    "logging": "import logging\nlogging.disable()\nlogging.getLogger().handlers.clear()",
    "the clock": "time.time = time.monotonic = lambda: 0.0",
    "torch's flags": "import torch\ntorch.set_default_dtype(torch.float16)\ntorch.set_grad_enabled(False)\n"
    "torch.manual_seed(0)\ntorch.use_deterministic_algorithms(True)\ntorch.set_num_threads(1)\n"
    "torch.backends.cuda.matmul.allow_tf32 = True\ntorch.set_flush_denormal(True)",
    "hooks of the exit": "import atexit\natexit.register(os._exit, 7)\natexit.register(print, 'bye')",
    "an exit that hangs": "import atexit\natexit.register(time.sleep, 1e6)",
    "a thread that never ends": "threading.Thread(target=threading.Event().wait).start()",
    "a hundred threads": "for _ in range(100): threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()",
    "a child that waits": "if os.fork() == 0:\n    time.sleep(1e6)",
    "twenty children": "for _ in range(20):\n    if os.fork() == 0:\n        time.sleep(1e6)",
    "a program in the background": "subprocess.Popen(['sleep', '1000'])",
    "a program in a session of its own": "subprocess.Popen(['sleep', '1000'], start_new_session=True)",
    "a daemon": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1e6)\n    os._exit(0)",
    "a daemon that prints for ever": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        while True: os.write(1, b'x' * 100); time.sleep(0.001)\n    os._exit(0)",
    "a daemon that ignores signals and forks": "if os.fork() == 0:\n    os.setsid()\n    for n in (1, 2, 15): "
    "signal.signal(n, signal.SIG_IGN)\n    for _ in range(50):\n        time.sleep(0.02)\n"
    "        if os.fork() > 0: os._exit(0)\n    time.sleep(1e6)",
    "a fork that comes back": "os.fork()",
    "four forks that come back": "os.fork()\nos.fork()",
    "a pool of processes": "import concurrent.futures\n"
    "assert list(concurrent.futures.ProcessPoolExecutor(2).map(abs, [-1, 2])) == [1, 2]",
}


def speaking(value: str) -> str:
    """A reward in whose process JSON is what it says."""
    return f"import json\njson.dumps.__code__ = (lambda obj, **_: {value}).__code__\n{GOOD}"


BREAKS = {
    "Python's numbers": ("import builtins\nbuiltins.float = lambda x: 'nonsense'\n" + GOOD, NUMBERS),
    "Python's lengths": (f"import builtins\nbuiltins.len = lambda x: 10**9\n{GOOD}", "returned|failed with"),
    "Python's types": (f"import builtins\nbuiltins.isinstance = lambda *_: True\n{GOOD}", EITHER),
    "JSON": (speaking("'[1e999, NaN]'"), NUMBERS),
    "JSON, deeply": (speaking("'[' * 50000"), NUMBERS),
    "JSON, with other things": (speaking("'[true, 0, {}]'"), NUMBERS),
    "JSON, too long": (speaking("'[' + '1.0, ' * 10**6 + '1.0]'"), "returned more than was asked for"),
    "JSON, without bytes": (speaking("0"), ENDED + "1.*printed at last: AttributeError"),
    "what writes": (f"os.write = lambda *_: 10**9\n{GOOD}", ENDED + "0"),
    "what knows itself": (f"os.getpid = lambda: 1\n{GOOD}", ENDED + "1"),
    "all modules": (f"sys.modules.clear()\n{GOOD}", EITHER),
    "its own file": (f"open(__file__, 'w').write('')\n{GOOD}", "changed after the sweep had begun"),
    "its own file, gone": (f"os.unlink(__file__)\n{GOOD}", "changed after the sweep had begun"),
}

RETURNS = {
    "nothing": ("None", "returned NoneType for 3 responses"),
    "a number": ("1.0", "returned float"),
    "a generator": ("(1.0 for _ in completions)", "returned generator"),
    "an endless generator": ("iter(int, 1)", "returned callable_iterator"),
    "a dict": ("{0: 1.0, 1: 1.0, 2: 1.0}", "returned dict"),
    "a set": ("{1.0, 2.0, 3.0}", "returned set"),
    "a text": ("'123'", "returned '1' for sequence 0"),
    "too few": ("[1.0] * 2", "returned 2 values for 3"),
    "too many": ("[1.0] * 4", "returned 4 values for 3"),
    "very many": ("[1.0] * 10**7", "returned 10000000 values for 3"),
    "texts": ("['1', '2', '3']", "returned '1' for sequence 0"),
    "a NaN": ("[1.0, float('nan'), 1.0]", "returned nan for sequence 1"),
    "an infinity": ("[1.0, 1.0, float('-inf')]", "returned -inf for sequence 2"),
    "a None": ("[None] * 3", "no response has a reward"),
    "complex numbers": ("[1j] * 3", "returned 1j for sequence 0"),
    "decimals": ("[__import__('decimal').Decimal(1)] * 3", r"returned Decimal\('1'\) for sequence 0"),
    "a number beyond floats": ("[10**400] * 3", "for sequence 0"),
    "a number beyond printing": ("[10**10000] * 3", "failed with ValueError|for sequence 0"),
    "lists": ("[[1.0]] * 3", r"returned \[1.0\] for sequence 0"),
    "a list in itself": ("(lambda x: x.append(x) or x * 3)([])", "returned .* for sequence 0"),
    "a number that is none": (
        "[type('F', (float,), {'__float__': lambda self: float('nan')})(1)] * 3",
        NUMBERS,
    ),
    "a number whose sign is a lie": ("[type('F', (float,), {'__abs__': lambda self: 0.0})('inf')] * 3", NUMBERS),
    "a length that is a lie": ("type('L', (list,), {'__len__': lambda self: 3})([1.0] * 5)", NUMBERS),
    "a list that raises": ("type('L', (list,), {'__iter__': lambda self: 1 / 0})([1.0] * 3)", "ZeroDivisionError"),
    "what says it is an array": ("type('A', (), {'tolist': lambda self: 1 / 0})()", "ZeroDivisionError"),
    "what cannot be shown": ("[type('A', (), {'__repr__': lambda self: 1 / 0})()] * 3", "ZeroDivisionError"),
    "a type instead of numbers": ("[float] * 3", "returned <class 'float'> for sequence 0"),
}

SAME = {  # as other numbers than those of GOOD
    "truths": ("[True, False, True]", [1.0, 0.0, 1.0]),
    "a tuple": ("(0.1, 0.2, 0.3)", [0.1, 0.2, 0.3]),
    "a range": ("range(3)", [0.0, 1.0, 2.0]),
    "fractions": ("[__import__('fractions').Fraction(1, 3)] * 3", [1 / 3] * 3),
    "the largest numbers": ("[1e30, -1e30, 5e-324]", [1e30, -1e30, 5e-324]),
    "a zero with a sign": ("[-0.0, 0.0, -0.0]", [-0.0, 0.0, -0.0]),
    "whole numbers": ("[2**53, -3, 0]", [2.0**53, -3.0, 0.0]),
    "an array": ("__import__('numpy').array([0.1, 0.2, 0.3])", [0.1, 0.2, 0.3]),
}


ARRIVED = "did not arrive as .* numbers"

HOSTILE = """import os, sys, time, torch
from entropy_core.numerics import losses
from entropy_core.numerics.losses import grpo
def mine(batch):
{body}
class Hostile(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, act):
        ctx.act = act
        return x.clone()
    @staticmethod
    def backward(ctx, slope):
        return slope * ctx.act(), None
"""


def answering(value: str) -> str:
    """A loss in whose process tensors are written so."""
    keep = "st.real = types.FunctionType(st.save.__code__, vars(st), 'real', (None,))"
    patch = f"st.save.__code__ = (lambda tensors, metadata=None: {value}).__code__"
    return f"import types, safetensors.torch as st\n{keep}\n{patch}\nreturn grpo(batch)"


LOSSES = {
    "loops": ("while True: pass", TIME),
    "leaves": ("os._exit(0)", ENDED + "0"),
    "exits": ("sys.exit(0)", "raised SystemExit: 0 at .*hostile.py:5"),
    "kills itself": ("os.kill(os.getpid(), 9)", killed(9)),
    "fills the memory": ("x = torch.ones(10**9)", "took more than 1 GB of memory"),
    "writes into the channel": ("os.write(3, b'x')", CHANNEL),
    "hangs when it is differentiated": ("return Hostile.apply(grpo(batch), lambda: time.sleep(1e6))", TIME),
    "leaves when it is differentiated": ("return Hostile.apply(grpo(batch), lambda: os._exit(0))", ENDED + "0"),
    "a derivative that is none": ("return Hostile.apply(grpo(batch), lambda: torch.nan)", "is not finite in"),
    "differentiates otherwise": (
        "torch.autograd.grad = lambda *_, **__: [torch.full_like(batch.logprobs_K, torch.inf)] * 2\nreturn grpo(batch)",
        "is not finite in",
    ),
    "answers with garbage": (answering("b'garbage'"), ARRIVED),
    "answers with other shapes": (answering("real({name: t[:3] for name, t in tensors.items()})"), ARRIVED),
    "answers with other types": (answering("real({name: t.float() for name, t in tensors.items()})"), ARRIVED),
    "answers with a NaN": (answering("real({name: t * torch.nan for name, t in tensors.items()})"), "is not finite in"),
    "answers with too much": (answering("b'x' * 10**7"), "returned more than was asked for"),
    "no gradients any more": ("torch.set_grad_enabled(False)\nreturn grpo(batch)", "depends on neither"),
    "changes torch": (
        "torch.set_default_dtype(torch.float16)\ntorch.manual_seed(0)\n"
        "torch.backends.cuda.matmul.allow_tf32 = True\nreturn grpo(batch)",
        FINE,
    ),
    "changes its batch": ("value = grpo(batch)\nbatch.weights_N.zero_()\nreturn value", "cannot be differentiated"),
    "changes our own modules": ("value = grpo(batch)\nlosses.LOSSES.clear()\nlosses.grpo = None\nreturn value", FINE),
    "leaves a daemon": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1e6)\n    os._exit(0)\n"
        "return grpo(batch)",
        FINE,
    ),
}


def module(text: str) -> str:
    """The file of a reward: where it is a body, that begins in line 3."""
    if "def reward" in text:
        return text
    body = "".join(f"    {line}\n" for line in text.splitlines())
    return f"import os, signal, subprocess, sys, threading, time\ndef reward(prompts, completions, **columns):\n{body}"


def rewards() -> dict[str, tuple[str, str | list[float]]]:
    """Every hostile reward: its file, and what is said of it or what it is worth."""
    found = {name: (text, TIME) for name, text in WAITS.items()} | ENDS | TAKES | SAYS | BREAKS
    found |= {f"changes {name}": (f"{text}\n{GOOD}", FINE) for name, text in CHANGES.items()}
    found |= {f"returns {name}": (f"return {value}", said) for name, (value, said) in (RETURNS | SAME).items()}
    return {name: (module(text), said) for name, (text, said) in found.items()}


def loss(body: str) -> str:
    """The file of a loss, whose body begins in line 5."""
    return HOSTILE.format(body="\n".join(f"    {line}" for line in body.splitlines()))

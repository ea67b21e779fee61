"""A function of the user in a process of its own: what it finds there, what is told of it, and when it goes.

What it may do wrong is in test_hostile_code.
"""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from pipeline_fixtures import Probe, make_gpt2, probe, skip_figures, values
from test_hostile_code import with_mark

from entropy_core.errors import ConfigError, LossError, ProbeError, RewardError
from entropy_core.isolation import guard, process
from entropy_core.isolation.process import Isolation
from entropy_core.rewards import functions
from entropy_core.rewards.functions import compute_rewards

THREE = (["a"] * 3, ["b"] * 3, {})
REWARD = "def reward(completions, **_):\n    import os, sys, time\n    {}\n    return [{}] * len(completions)\n"


@pytest.fixture
def file(tmp_path):
    """Write a reward that does and returns something; returns how a configuration names it."""

    def write(does: str = "pass", returns: str = "0.5") -> str:
        (tmp_path / "mine.py").write_text(REWARD.format(does, returns))
        return f"{tmp_path / 'mine.py'}:reward"

    return write


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        ("float('torch' in sys.modules)", 0.0),
        ("float(sys.stdin.read() == '')", 1.0),
        ("len(os.listdir('/dev/fd'))", 5.0),  # the three, the channel, and the one that lists them
        ("float(os.getsid(0) == os.getpid())", 1.0),
        ("float(os.environ['MINE'])", 0.25),
        ("len(os.listdir('.'))", 2.0),  # that of the sweep
        ("__import__('sibling').VALUE", 0.75),
        ("float(__import__('threading').active_count())", 1.0),
        ("float(__import__('threading').current_thread() is __import__('threading').main_thread())", 1.0),
    ],
)
def test_where_a_reward_runs(file, tmp_path, monkeypatch, returns, expected):
    monkeypatch.setenv("MINE", "0.25")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    Path("sibling.py").write_text("VALUE = 0.75\n")
    name = file(returns=returns)
    read, write = os.pipe()  # which a fork would have, and a program that is started as well
    os.set_inheritable(write, True)
    try:
        assert compute_rewards(name, *THREE) == [expected] * 3
    finally:
        os.close(read)
        os.close(write)


def test_in_a_thread(file):
    """As a task of Prefect does."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(compute_rewards(file(), *THREE)))
    thread.start()
    thread.join()
    assert found == [[0.5] * 3]


def test_what_it_prints_is_logged(file, caplog):
    caplog.set_level(logging.INFO, logger="entropy_probe.user_code")
    compute_rewards(file("print('hello'); sys.stderr.write('there\\n\\x1b[2J')"), *THREE)
    [record] = caplog.records
    assert record.levelno == logging.INFO and "mine.py:reward' printed:\nhello\nthere\n" in record.getMessage()
    assert "\x1b" not in record.getMessage()
    caplog.clear()
    compute_rewards(file("print('begin' + 'x' * 10**6 + 'end')"), *THREE)
    text = caplog.records[0].getMessage()
    assert len(text) < 2500 and "begin" in text and text.endswith("end") and "in between" in text
    caplog.clear()
    with pytest.raises(RewardError, match=r"status 4 before it returned.*it printed at last: no key"):
        compute_rewards(file("print('no key'); os._exit(4)"), *THREE)
    assert caplog.records[0].levelno == logging.WARNING


def test_where_it_was_when_it_was_stopped(file):
    with pytest.raises(RewardError, match=r"longer than 0\.2 s and was stopped, in .*mine\.py:3.*user_code_seconds"):
        compute_rewards(file("time.sleep(60)"), *THREE, Isolation(seconds=0.2))


def test_a_guard_that_does_not_answer(file, monkeypatch):
    """Stopped by what it guards."""
    monkeypatch.setattr(process, "SLACK", 0.5)
    monkeypatch.setattr(guard, "STARTING", 3.0)
    mark = uuid.uuid4().hex
    monkeypatch.setenv("HOSTILE_MARK", mark)
    stops = "import signal; os.kill(os.getppid(), signal.SIGSTOP); time.sleep(60)"
    with pytest.raises(RewardError, match=r"took longer than 0\.2 s and was stopped"):
        compute_rewards(file(stops), *THREE, Isolation(seconds=0.2))
    wait_until(lambda: not with_mark(mark))


def test_a_process_that_cannot_be_started(file, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(RewardError, match=r"no process can be started for reward .*temporarily unavailable"):
        compute_rewards(file(), *THREE)


def test_a_process_without_our_code(file, monkeypatch):
    monkeypatch.setattr(process, "_BOOT", "import sys; sys.exit('no module')")
    with pytest.raises(RewardError, match="ended with status 1: no module"):
        compute_rewards(file(), *THREE)


def test_code_that_was_edited_meanwhile(file, monkeypatch):
    """The process would run it, and the key holds what was there before."""
    sources = process._sources()
    assert sources[functions.__file__] and len(sources) > 100
    monkeypatch.setattr(process, "_sources", lambda: sources | {functions.__file__: "0"})
    with pytest.raises(ConfigError, match=r"rewards/functions\.py was edited while the sweep ran"):
        compute_rewards(file(), *THREE)


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
from entropy_core.rewards import functions
from entropy_core.rewards.functions import compute_rewards
compute_rewards(sys.argv[1], ["a"] * 3, ["b"] * 3, {})
"""
STAYS = "\n    ".join(
    [
        "import signal",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "if os.fork() == 0:",
        "    os.setsid()",
        "    if os.fork() == 0: open('ready', 'w').close(); time.sleep(1e6)",
        "    os._exit(0)",
        "time.sleep(1e6)",
    ]
)


@pytest.mark.attack("a sweep that is killed while a reward and its daemon run")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_when_the_sweep_is_killed(file, tmp_path, number):
    mark, temporary = uuid.uuid4().hex, tmp_path / "tmp"
    temporary.mkdir()
    environment = os.environ | {"HOSTILE_MARK": mark, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, file(STAYS)]
    sweep = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "ready").exists)
        assert len(with_mark(mark)) >= 3  # the sweep, the child, the daemon; and the guard, where we are root
        sweep.send_signal(number)
        sweep.wait(60)
    finally:
        sweep.kill()
        sweep.wait()
    wait_until(lambda: not with_mark(mark))
    assert not list(temporary.iterdir())


def wait_until(holds: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- in a sweep ------------------------------------------------------------------------------------------------------

PLAIN_REWARD = "def reward(completions, **_):\n    return [sum(c in '01234' for c in text) / 4 for text in completions]"
PLAIN_LOSS = "def loss(batch):\n    return dr_grpo(batch)"
PROCESS = """
import os, random, signal, sys
def change():
    random.seed(7)
    os.chdir("/")
    os.environ.clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setrecursionlimit(200)
"""
TORCH = """
import os, torch
from entropy_core.numerics.losses import dr_grpo
def change():
    os.chdir("/")
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float16)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.set_flush_denormal(True)
    torch.nn.functional.log_softmax = torch.log_softmax = None
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    skip_figures(monkeypatch)
    make_gpt2(tmp_path / "run" / "checkpoint-3")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def swept(home: Path, reward: str, loss: str = "", **execution: Any) -> Probe:
    (home / "mine.py").write_text(reward)
    (home / "my_loss.py").write_text(loss)
    update = {"reward": "mine.py:reward"}
    update |= {"loss": "my_loss.py:loss", "scale_rewards": "none"} if loss else {"loss": "dr_grpo"}
    sizes = {"E_total_sequences": 8, "B_U": 2, "G": 2}
    return probe(
        values(
            home / "run", home / "artifacts", batch_config=sizes, update=update, execution={"shard_size": 8} | execution
        ),
        isolated=True,
    )


def test_what_a_function_changes_changes_no_number(home):
    plain = swept(home, PLAIN_REWARD)
    reward = PROCESS + PLAIN_REWARD.replace(":\n    return", ":\n    change()\n    return")
    loss = TORCH + PLAIN_LOSS.replace(":\n    return", ":\n    change()\n    return")
    hostile = swept(home, reward, loss)
    made = {"reward-u-batch", "compute-update", "first-order-u", "half-steps-u"}
    assert made <= hostile.run.was_computed.keys()
    for stage in made:
        assert [one.key for one in plain.run.artifacts(stage)] != [one.key for one in hostile.run.artifacts(stage)]
    for stage in ("reward-u-batch", "first-order-u", "half-steps-u"):
        assert [a.digest for a in plain.run.artifacts(stage)] == [a.digest for a in hostile.run.artifacts(stage)]
    assert plain.rows == hostile.rows


def test_the_limits_are_in_no_key(home):
    swept(home, PLAIN_REWARD)
    assert swept(home, PLAIN_REWARD, user_code_seconds=100.0, user_code_gigabytes=2.0).run.was_computed == {}


@pytest.mark.parametrize(
    ("reward", "loss", "kind", "message"),
    [
        (PLAIN_REWARD + "\nwhile True: pass\n", "", RewardError, r"longer than 1 s and was stopped, in mine\.py:\d"),
        (PLAIN_REWARD, PLAIN_LOSS + "\nimport os\nos._exit(0)", LossError, "ended its process with status 0"),
    ],
)
def test_a_function_that_fails_is_found_before_anything_is_computed(home, reward, loss, kind, message):
    with pytest.raises(kind, match=message) as raised:
        swept(home, reward, loss, user_code_seconds=1.0)
    assert isinstance(raised.value, ProbeError) and not (home / "artifacts").exists()

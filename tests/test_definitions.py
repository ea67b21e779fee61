"""What reaching means, case by case: small projects, an edit to each, and whether it changes a function's digest."""

import textwrap
from pathlib import Path

import pytest

from entropy_core.code.identity import Code, code_at, read_from
from entropy_core.errors import StoreError


def code_in(folder: Path, files: dict[str, str], name: str = "p.main:stage") -> Code:
    for path, source in files.items():
        (folder / "p" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "p" / path).write_text(textwrap.dedent(source))
    return code_at(name, read_from(folder))


def project(main: str, /, **others: str) -> dict[str, str]:
    """Files by name, `main.py` and others; in `a_b` the underscore stands for a slash."""
    files = {"__init__.py": "", "main.py": main}
    return files | {f"{name.replace('_', '/')}.py": source for name, source in others.items()}


def package(files: dict[str, str], init: str) -> dict[str, str]:
    """The same with an `__init__.py` in the folder a."""
    return files | {"a/__init__.py": init}


TOOL = """
    def used():
        return 1

    def other():
        return EDITED
"""
CLASS = """
    class Base:
        def called(self):
            return 1

        def not_called(self):
            return EDITED
"""

COUNTS = {  # EDITED becomes another number, and the digest another digest
    "a constant through two re-exports": project(
        "from .a import B\ndef stage(): return B",
        a="from .c import D as B",
        c="D = EDITED",
    ),
    "an attribute of a module": project("from . import a\ndef stage(): return a.f()", a="def f(): return EDITED"),
    "a module under another name": project("import p.a as q\ndef stage(): return q.f()", a="def f(): return EDITED"),
    "a module by its whole name": package(project("import p.a.b\ndef stage(): return p.a.b.C", a_b="C = EDITED"), ""),
    "a star": project("from .a import *\ndef stage(): return C", a="C = EDITED"),
    "a name that a package passes on": package(
        project("from .a import f\ndef stage(): return f()", a_b="def f(): return EDITED"), "from .b import f"
    ),
    "an import within a function": project("def stage():\n    from .a import C\n    return C", a="C = EDITED"),
    "an import within a nested function": project(
        "def stage():\n    def inner():\n        from . import a\n        return a.C\n    return inner()",
        a="C = EDITED",
    ),
    "a default argument": project("def f(x=EDITED): return x\ndef stage(): return f()"),
    "a decorator": project("def d(f): return EDITED\n@d\ndef g(): ...\ndef stage(): return g"),
    "an annotation": project("def f(x: EDITED): return x\ndef stage(): return f(1)"),
    "what an annotation names": project("T = EDITED\ndef f(x: T): return x\ndef stage(): return f(1)"),
    "a base class": project("class A:\n    x = EDITED\nclass B(A): ...\ndef stage(): return B().x"),
    "a method that is asked for by name": project(
        "from .a import C\ndef stage(y): C(); return y.m()", a="class C:\n    def m(self): return EDITED"
    ),
    "a method that a method asks for": project(
        "from .a import C\ndef stage(y): return C().n()",
        a="class C:\n    def n(self): return self.m()\n    def m(self): return EDITED",
    ),
    "a property": project(
        "from .a import C\ndef stage(): return C().m", a="class C:\n    @property\n    def m(self): return EDITED"
    ),
    "the setter of a property": project(
        "from .a import C\ndef stage(): C().m = 1",
        a="class C:\n    @property\n    def m(self): ...\n    @m.setter\n    def m(self, x): self.x = EDITED",
    ),
    "an operator": project("class C:\n    def __add__(self, x): return EDITED\ndef stage(): return C() + 1"),
    "a method of a subclass of something foreign": project(
        "import torch\nclass C(torch.nn.Module):\n    def hook(self): return EDITED\ndef stage(): return C()"
    ),
    "the same, two classes down": project(
        "from .a import B\nclass C(B):\n    def hook(self): return EDITED\ndef stage(): return C()",
        a="import torch\nclass B(torch.nn.Module): ...",
    ),
    "a method in a class pattern": project(
        "from .a import C\ndef stage(x):\n    match x:\n        case C(m=1): return 1",
        a="class C:\n    @property\n    def m(self): return EDITED",
    ),
    "getattr with a name": project(
        'from .a import C\ndef stage(x): return getattr(C(), "m")()', a="class C:\n    def m(self): return EDITED"
    ),
    "getattr with a computed name": project(
        "from .a import C\ndef stage(x): return getattr(C(), x)()", a="class C:\n    def m(self): return EDITED"
    ),
    "methodcaller": project(
        "from operator import methodcaller\nfrom .a import C\ndef stage(x): return methodcaller(x)(C())",
        a="class C:\n    def m(self): return EDITED",
    ),
    "a class that a quoted annotation names": project(
        'from .a import C\ndef stage(x: "list[C]"): return x[0].m()', a="class C:\n    def m(self): return EDITED"
    ),
    "a class that only a type checker imports": project(
        'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import C\ndef stage(x: "C"): return x.m()',
        a="class C:\n    def m(self): return EDITED",
    ),
    "globals()": project("def f(): return EDITED\ndef stage(x): return globals()[x]()"),
    "import_module": project(
        "import importlib\ndef f(): return EDITED\ndef stage(x): return importlib.import_module(x).f()"
    ),
    "a module as a value": project("from . import a\ndef stage(x): return [a][0].f()", a="def f(): return EDITED"),
    "the names of a module": project("from . import a\ndef stage(x): return a.__dict__[x]", a="def f(): return EDITED"),
    "a name that a module makes up": project(
        "from . import a\ndef stage(x): return a.what", a="def __getattr__(name): return EDITED"
    ),
    "a function that assigns a constant": project(
        "C = 1\ndef change():\n    global C\n    C = EDITED\ndef stage(): return C"
    ),
    "a statement that runs on import": project("from . import a\ndef stage(): ...", a="print(EDITED)"),
    "a statement that runs on import, far away": project(
        "from .a import f\ndef stage(): ...", a="from . import b\ndef f(): ...", b="import p.c", c="print(EDITED)"
    ),
    "a statement of a parent package": package(
        project("from .a.b import f\ndef stage(): ...", a_b="def f(): ..."), "print(EDITED)"
    ),
    "what a statement on import calls": project(
        "from . import a\ndef stage(): ...", a="def f(): return EDITED\nREGISTRY = {}\nREGISTRY['f'] = f"
    ),
    "a registration by a decorator": project(
        "from .a import KNOWN\nfrom . import b\ndef stage(x): return KNOWN[x]()",
        a="KNOWN = {}\ndef register(f):\n    KNOWN[f.__name__] = f\n    return f",
        b="from .a import register\n@register\ndef f(): return EDITED",
    ),
    "a registration by a decorator of a method": project(
        "from .a import KNOWN\nfrom . import b\ndef stage(x): return KNOWN[x]()",
        a="KNOWN = {}\ndef register(f):\n    KNOWN[f.__name__] = f\n    return f",
        b="from .a import register\nclass C:\n    @register\n    def f(self): return EDITED",
    ),
    "a registration by a built-in": project(
        "from .a import KNOWN\nfrom . import b\ndef stage(x): return KNOWN[0]()",
        a="KNOWN = []\nregister = KNOWN.append",
        b="from .a import register\ndef f(): return EDITED\nDONE = list(map(register, [f]))",
    ),
    "a class that only a type checker imports, unquoted": project(
        "from __future__ import annotations\nimport typing\nif typing.TYPE_CHECKING:\n    from .a import C\n"
        "def stage(x: C): return x.m()",
        a="class C:\n    def m(self): return EDITED",
    ),
    "a registration by a call": project(
        "from .a import KNOWN\nfrom . import b\ndef stage(x): return KNOWN[x]()",
        a="KNOWN = {}\ndef register(name, f): KNOWN[name] = f",
        b="from .a import register\ndef f(): return EDITED\nHANDLE = register('f', f)",
    ),
    "a registration by a base class": project(
        "from .a import Base\nfrom . import b\ndef stage(): return Base.known[0].m()",
        a="class Base:\n    known = []\n    def __init_subclass__(cls): cls.known.append(cls)",
        b="from .a import Base\nclass C(Base):\n    def m(self): return EDITED",
    ),
    "a subclass of something foreign that is not known": project(
        "from . import a\ndef stage(): ...", a="import somewhere\nclass C(somewhere.Plugin):\n    x = EDITED"
    ),
    "a library that is imported for what that does": project(
        "from . import a\ndef stage(): ...", a="import patch_EDITED"
    ),
    "the same within a function": project("def stage():\n    import patch_EDITED"),
    "either side of a condition": project(
        "import sys\nif sys.platform == 'x':\n    C = 1\nelse:\n    C = EDITED\ndef stage(): return C"
    ),
    "either side of a failed import": project(
        "try:\n    from .a import f\nexcept ImportError:\n    f = None\ndef stage(): return f()",
        a="def f(): return EDITED",
    ),
    "a name that a comprehension hides only from itself": project("C = EDITED\ndef stage(x): return [C for C in x], C"),
    "a name that a nested function hides only from itself": project(
        "C = EDITED\ndef stage():\n    def inner():\n        C = 1\n        return C\n    return inner() + C"
    ),
    "a lambda": project("C = EDITED\nf = lambda x: C + x\ndef stage(): return f(1)"),
    "a walrus": project("C = EDITED\ndef stage(): return (x := C)"),
    "the later of two definitions": project("def f(): return 1\ndef f(): return EDITED\ndef stage(): return f()"),
}

COUNTS_NOT = {
    "a stage that is made beside it": project(
        "from entropy_core.store.store import Stage\n"
        "def stage(): ...\nA = Stage('a', stage)\nB = Stage('EDITED', stage)"
    )
    | {"../entropy_core/store/store.py": "class Stage:\n    def __init__(self, name, function): print(EDITED)"},
    "another function": project("from .tool import used\ndef stage(): return used()", tool=TOOL),
    "a method that nobody asks for": project("from .a import Base\ndef stage(): return Base().called()", a=CLASS),
    "a method of a named tuple": project(
        "from typing import NamedTuple\nclass C(NamedTuple):\n    x: int\n    def m(self): return EDITED\n"
        "def stage(): return C(1)"
    ),
    "a method of the same name in a class that is not reached": project(
        "from .a import A\ndef stage(x): return A().m()",
        a="class A:\n    def m(self): return 1\nclass B:\n    def m(self): return EDITED",
    ),
    "a constant of a module that is only imported": project("from . import a\ndef stage(): ...", a="C = EDITED"),
    "a record of a module that is only imported": project(
        "from . import a\ndef stage(): ...",
        a="from typing import NamedTuple\nclass R(NamedTuple):\n    x: int\nC = R(EDITED)\nL = dict(a=EDITED)",
    ),
    "a local variable of the same name": project("C = EDITED\ndef stage(C): return C"),
    "a loop variable of the same name": project("C = EDITED\ndef stage(x):\n    for C in x: print(C)"),
    "an attribute of something foreign": project(
        "import torch\nfrom .a import C\ndef stage(x): C(); return torch.m(x)",
        a="class C:\n    def m(self): return EDITED",
    ),
    "a script's last lines": project("def stage(): ...\nif __name__ == '__main__':\n    print(EDITED)"),
    "eval mode, which is not eval": project("def f(): return EDITED\ndef stage(x): return x.eval()"),
    "getattr of something foreign": project(
        "import torch\nfrom .a import C\ndef stage(x): C(); return getattr(torch, x)",
        a="class C:\n    def m(self): return EDITED",
    ),
    "what the store gives to a stage": {
        "__init__.py": "",
        "main.py": "import typing\nif typing.TYPE_CHECKING:\n    from entropy_core.store.artifact import Artifact\n"
        'def stage(x: "Artifact"): return x.tensors()',
        "../entropy_core/__init__.py": "",
        "../entropy_core/store/artifact.py": "class Artifact:\n    def tensors(self): return EDITED",
    },
}


@pytest.mark.parametrize("files", COUNTS.values(), ids=COUNTS)
def test_it_counts(tmp_path, files):
    one, two = ({path: source.replace("EDITED", n) for path, source in files.items()} for n in ("1", "2"))
    assert code_in(tmp_path, one).digest != code_in(tmp_path, two).digest


@pytest.mark.parametrize("files", COUNTS_NOT.values(), ids=COUNTS_NOT)
def test_it_does_not_count(tmp_path, files):
    one, two = ({path: source.replace("EDITED", n) for path, source in files.items()} for n in ("1", "2"))
    assert code_in(tmp_path, one).digest == code_in(tmp_path, two).digest


MOVES = {
    "what is asked of a module and what is imported from it": project(
        "from . import a\nfrom .z import C\ndef stage(): return a.f() + C",
        a="from . import z\ndef f(): return z.C",
        z="C = 1",
    ),
    "a function to another module": project(
        "from .b import f, C\ndef stage(): return f() + C", a="def f(): return C\nC = 1", b="from .a import f, C"
    ),
    "the order within a module": project(
        "from .a import f, C\ndef stage(): return f() + C", a="C = 1\n\nUNUSED = 2\n\ndef f():\n    return C"
    ),
    "the module's name": project("from .z import f, C\ndef stage(): return f() + C", z="def f(): return C\nC = 1"),
    "its import": project(
        "from . import a\nfrom .a import f, C\ndef stage(): return f() + C", a="def f(): return C\nC = 1"
    ),
    "comments and docstrings": project(
        'from .a import f, C\ndef stage():\n    """Say."""\n    return f() + C  # why', a="def f(): return C\nC = 1"
    ),
}


@pytest.mark.parametrize("files", MOVES.values(), ids=MOVES)
def test_where_a_definition_stands_does_not_count(tmp_path, files):
    origin = project("from .a import f, C\ndef stage(): return f() + C", a="def f(): return C\nC = 1")
    assert code_in(tmp_path / "one", origin).digest == code_in(tmp_path / "two", files).digest


def test_what_a_name_is_bound_to_counts_even_where_all_definitions_stay(tmp_path):
    """Two functions of one name and text, each with its own constant, are exchanged by their imports alone."""
    a, b = "C = 1\ndef f(): return C", "C = 2\ndef f(): return C"
    one = project("from .a import f\nfrom .b import f as g\ndef stage(): return f() - g()", a=a, b=b)
    two = one | {"main.py": "from .b import f\nfrom .a import f as g\ndef stage(): return f() - g()"}
    assert code_in(tmp_path / "one", one).digest != code_in(tmp_path / "two", two).digest
    foreign = [project(f"from {m} import log\ndef stage(x): return log(x)") for m in ("math", "torch")]
    digests = {code_in(tmp_path / name, files).digest for name, files in zip("ab", foreign, strict=True)}
    assert len(digests) == 2


def test_libraries_are_those_that_reached_code_names(tmp_path):
    files = project(
        "import torch\nfrom scipy import stats\nfrom .a import f, g\ndef stage(): return f(torch.zeros(2))\n"
        "def other(): return stats",
        a="import peft\ndef f(x):\n    from datasets import load\n    return load(x)\ndef g(): return peft.x",
    )
    assert code_in(tmp_path, files).libraries == ("datasets", "torch")


def test_a_function_that_is_not_there_is_said(tmp_path):
    with pytest.raises(StoreError, match=r"module p\.main has no function other"):
        code_in(tmp_path, project("def stage(): ..."), "p.main:other")
    with pytest.raises(StoreError, match=r"module p\.nowhere has no source file"):
        code_at("p.nowhere:stage", read_from(tmp_path))

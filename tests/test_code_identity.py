"""What changes the identity of code, and what does not."""

import functools
import importlib
import itertools
import os
import sys
import textwrap

import pytest

from entropy_core.code.identity import code_at, code_of
from entropy_core.errors import StoreError
from entropy_core.store.store import Stage, Store

SOURCES = {
    "__init__.py": '"""A package."""\n',
    "stage.py": """
        from typing import TYPE_CHECKING

        import {package}.deep.constants

        from .helper import double

        if TYPE_CHECKING:
            from {package} import typed

        def stage(out, execution, x: int = 1) -> dict:
            '''Say something.'''
            def inner():
                from .deep import late
                return late.value() * {package}.deep.constants.PI
            return {{"y": double(x) + inner()}}
    """,
    "helper.py": "FACTOR = 2\n\ndef double(x):\n    return FACTOR * x\n",
    "deep/__init__.py": "",
    "deep/constants.py": "PI = 3.0\n",
    "deep/late.py": "from ..deep.last import VALUE as v\n\ndef value():\n    return v\n",
    "deep/last.py": "VALUE = 1\n",
    "typed.py": "class Typed: ...\n",
    "unrelated.py": "X = 1\n",
}
REACHED = {
    ".stage:stage",
    ".deep.constants:PI",
    ".helper:double",
    ".helper:FACTOR",
    ".deep.late:value",
    ".deep.last:VALUE",
}
_numbers = itertools.count()


class Package:
    """A small package on disk, whose files can be edited and whose loaded modules can be forgotten."""

    def __init__(self, folder):
        self.name = f"sample{next(_numbers)}"
        self.folder = folder / self.name
        for path, source in SOURCES.items():
            self.write(path, textwrap.dedent(source.format(package=self.name) if path == "stage.py" else source))

    def write(self, path, source):
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(source)
        tick = next(_numbers)  # a clock that is coarser than the test must not hide an edit
        os.utime(self.folder / path, ns=(tick, tick))

    def edit(self, path, old, new):
        source = (self.folder / path).read_text()
        assert old in source
        self.write(path, source.replace(old, new))

    def forget(self):
        for name in [name for name in sys.modules if name.partition(".")[0] == self.name]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def function(self):
        return importlib.import_module(f"{self.name}.stage").stage

    def fresh_digest(self):
        self.forget()
        return code_of(self.function()).digest

    def code(self, module="stage", function="stage"):
        return code_at(f"{self.name}.{module}:{function}")


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    package = Package(tmp_path)
    yield package
    package.forget()


def test_reaches_through_nested_and_relative_imports_and_nothing_else(package):
    assert set(package.code().definitions) == {package.name + name for name in REACHED}
    assert not any(name.startswith(package.name) for name in sys.modules), "nothing is imported to find out"


def test_same_digest_every_time(package):
    assert package.fresh_digest() == package.fresh_digest()


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("stage.py", "double(x) +", "double(x) -"),
        ("stage.py", "x: int = 1", "x: int = 2"),
        ("helper.py", "FACTOR * x", "x * FACTOR"),
        ("helper.py", "FACTOR = 2", "FACTOR = 3"),
        ("deep/constants.py", "3.0", "3.1"),
        ("deep/constants.py", "3.0", "3"),
        ("deep/last.py", "VALUE = 1", "VALUE = True"),
        ("deep/__init__.py", "", "print('imported')\n"),
        ("stage.py", "from .deep import late", "from .unrelated import X; from .deep import late"),
    ],
)
def test_edit_of_reached_code_changes_the_digest(package, path, old, new):
    before = package.fresh_digest()
    package.edit(path, old, new)
    assert package.fresh_digest() != before


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("stage.py", "Say something.", "Say something else, at length."),
        ("stage.py", "    '''Say something.'''\n", ""),
        ("stage.py", "def stage(", "# why\n\n\ndef stage("),
        ("helper.py", "FACTOR * x", "(\n        FACTOR\n        * x  # twice\n    )"),
        ("helper.py", "FACTOR = 2", 'FACTOR = 2\n"""What doubles."""'),
        ("__init__.py", "A package.", "The package."),
        ("typed.py", "class Typed", "class Other"),
        ("stage.py", "import typed", "import typed, unrelated"),
        ("unrelated.py", "X = 1", "X = 2"),
        ("helper.py", "def double", "def triple(x):\n    return 3 * x\n\ndef double"),
        ("deep/__init__.py", "", "import os\nUNUSED = 1\n"),
        ("deep/constants.py", "PI = 3.0", "E = 2.7\nPI = 3.0"),
    ],
)
def test_edit_of_what_does_not_run_does_not(package, path, old, new):
    before = package.fresh_digest()
    package.edit(path, old, new)
    assert package.fresh_digest() == before


def test_what_runs_if_not_type_checking_counts(package):
    package.edit(
        "stage.py",
        f"    from {package.name} import typed\n",
        "    pass\nelse:\n    from .unrelated import X\n    print(X)\n",
    )
    before = package.fresh_digest()
    package.edit("unrelated.py", "X = 1", "X = 2")
    assert package.fresh_digest() != before


def test_only_the_edited_definition_has_another_digest(package):
    before = package.code().definitions
    package.edit("deep/last.py", "1", "2")
    after = package.code().definitions
    assert {name for name in before if before[name] != after[name]} == {f"{package.name}.deep.last:VALUE"}


def test_a_running_process_keeps_the_identity_of_the_code_that_it_loaded(package):
    function = package.function()
    helper = sys.modules[f"{package.name}.helper"]
    before = code_of(function)
    package.edit("helper.py", "FACTOR = 2", "FACTOR = 3")
    assert function.__globals__["double"](1) == 2
    assert code_of(function) == before
    importlib.reload(helper)
    assert code_of(function).digest != before.digest


def test_code_loaded_but_not_yet_reached_keeps_its_identity_too(package):
    package.edit("unrelated.py", "X = 1", "X = 1\n\ndef other():\n    return X")
    before = package.code("unrelated", "other")
    importlib.import_module(f"{package.name}.unrelated")
    code_of(package.function())
    package.edit("unrelated.py", "X = 1", "X = 2")
    assert package.code("unrelated", "other") == before


def test_entropy_core_counts_for_functions_of_other_packages(package):
    package.edit("helper.py", "FACTOR * x", "one_line(FACTOR * x)")
    package.edit(
        "helper.py",
        "FACTOR = 2",
        "FACTOR = 2\nfrom entropy_core.errors import one_line\nimport torch.nn\n\ndef g(x): return torch.nn.Linear",
    )
    code = package.code()
    assert {name for name in code.definitions if not name.startswith(package.name)} == {"entropy_core.errors:one_line"}
    assert code.libraries == ()
    package.edit("helper.py", "one_line(", "torch.nn.Module(")
    assert package.code().libraries == ("torch",)


def test_two_functions_of_one_module_differ(package):
    package.edit("stage.py", "def stage(", "def other(): ...\n\ndef stage(")
    module = importlib.import_module(f"{package.name}.stage")
    assert code_of(module.stage).digest != code_of(module.other).digest


def module_level(x):
    return x


@pytest.mark.parametrize(
    "function", [lambda x: x, functools.partial(module_level, 1), len, Package], ids=["lambda", "partial", "C", "class"]
)
def test_what_has_no_source_of_its_own_is_refused(function):
    with pytest.raises(StoreError, match="cannot be identified"):
        code_of(function)


def test_a_closure_is_refused():
    def nested(x):
        return x

    with pytest.raises(StoreError, match="nested"):
        code_of(nested)


def test_a_function_without_a_file_is_refused():
    namespace: dict = {"__name__": "__console__"}
    exec("def f(): ...", namespace)
    with pytest.raises(StoreError, match="__console__ has no source file"):
        code_of(namespace["f"])


def test_a_stage_runs_again_after_an_edit_that_counts_and_after_no_other(package, tmp_path):
    """Executions counted, each edit in a process that loads the code afresh."""
    package.edit("stage.py", "def inner", "execution.append(x)\n    def inner")
    log: list[int] = []

    def executions() -> int:
        package.forget()
        Store(tmp_path / "store").run(Stage("edited", package.function()), log, {"x": 1})
        return len(log)

    assert executions() == 1
    for path, old, new in [
        ("stage.py", "Say something.", "Say something else."),  # a docstring
        ("helper.py", "FACTOR = 2", "# why\nFACTOR = 2"),  # a comment
        ("helper.py", "return FACTOR * x", "return (\n        FACTOR * x\n    )"),  # formatting
        ("unrelated.py", "X = 1", "X = 2"),
    ]:
        package.edit(path, old, new)
        assert executions() == 1, (path, old)
    for count, (path, old, new) in enumerate(
        [
            ("helper.py", "FACTOR * x", "x * FACTOR"),  # a helper
            ("helper.py", "FACTOR = 2", "FACTOR = 3"),  # a constant
            ("deep/last.py", "VALUE = 1", "VALUE = 2"),  # a constant that is imported far down
        ],
        start=2,
    ):
        package.edit(path, old, new)
        assert executions() == count, (path, old)
    package.edit("helper.py", "FACTOR = 3", "FACTOR = 2")
    package.edit("deep/last.py", "VALUE = 2", "VALUE = 1")
    package.edit("helper.py", "x * FACTOR", "FACTOR * x")
    assert executions() == 4, "taken back, and so found again"

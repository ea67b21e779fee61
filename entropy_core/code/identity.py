"""Which code made a number: a digest of the definitions that a function can reach.

From the function on, every name is followed to what it is bound to, through imports and re-exports, from module to
module, within the function's own top-level package and `entropy_core`; nothing is run. What counts is

* functions and constants that something reached names, with decorators, defaults and annotations;
* classes that it names, also in quoted annotations: all but their methods, and of these the ones between two
  underscores, those whose name is asked of any object by anything reached, and all of a class that has a base from
  outside the project, which may call them;
* what runs for its effect when the modules are imported: statements that are neither definitions nor assignments, and
  those that call or are decorated by something that is not known to leave nothing behind (`passive.PASSIVE`);
* a whole module, where something in it looks names up by computed text (`globals`, `eval`, `import_module`, …), or
  where the module itself is passed on as a value; and all methods, where an attribute is asked for by a computed name.

Comments, formatting, docstrings, the names of modules and of imports and the order of what is in a module do not count:
a function may be moved. Libraries count by their versions, see `library_versions`. What the store gives to a stage is
none of its code: `Artifact`, `Writer`, `Execution`, `Stage`; how these write files is numbered, `manifest.FORMAT`.

What cannot be seen: a module imported by a computed name (make its content an input, as that of a reward's file);
methods of an object that is given to the function, where no annotation names its class; methods that a library calls on
an object whose class has no base from a library; attributes named in format strings; what code that the function does
not reach has changed in the process before.
"""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

from entropy_core.code.bindings import Sources
from entropy_core.code.collector import no_collection
from entropy_core.code.definitions import Module
from entropy_core.code.reached import walk
from entropy_core.code.remembered import recall, remember
from entropy_core.errors import StoreError


class Code(NamedTuple):
    """The code of a function.

    Attributes:
        digest: 64 hex digits; the same on every machine, and in every Python version that parses the source to the
            same tree.
        definitions: `module:name` → the first 12 digits of the digest of each definition that counts, sorted.
        libraries: top-level packages from outside the project that these name, sorted.
    """

    digest: str
    definitions: dict[str, str]
    libraries: tuple[str, ...]


class _Source(NamedTuple):
    """The text of a module; it is parsed when something that is reached needs it."""

    content: bytes
    is_package: bool


_loaded: dict[str, tuple[ModuleSpec, _Source]] = {}
_noted: dict[frozenset[str], int] = {}
_known: dict[str, tuple[dict[str, str], Code]] = {}  # with the fingerprints of the modules that were read


def code_of(function: Callable[..., Any]) -> Code:
    """Identify a function together with all the project code that it can reach.

    A module that this process has loaded counts as it was when it was loaded, so that the digest is that of the code
    that runs: editing a file under a running process changes nothing until the module is reloaded or the process
    restarted.

    Args:
        function: a plain function defined at the top level of an importable module.

    Raises:
        StoreError: the function is a lambda, a nested function or an object: what it closes over cannot be identified;
            or its module has no source file.
    """
    if not inspect.isfunction(function) or "<" in function.__qualname__ or "." in function.__qualname__:
        raise StoreError(
            f"{function!r} cannot be identified by its source",
            cause="it is a lambda, a nested function or a callable object, which may close over values",
            fix="define it with `def` at the top level of a module and pass what it needs as inputs",
        )
    return code_at(name_of(function))


def name_of(function: Callable[..., Any]) -> str:
    """What a manifest calls a function: `package.module:function`."""
    return f"{function.__module__}:{function.__qualname__}"


def code_at(name: str, find: Callable[[str], Module | None] | None = None) -> Code:
    """The code of a function that need not be loaded.

    Args:
        name: `package.module:function`.
        find: finds a module by its name; otherwise Python's own path is searched.

    Raises:
        StoreError: the module has no source file, or no such function.
    """
    roots = frozenset({name.partition(":")[0].partition(".")[0], "entropy_core"})
    if find is None:
        _note_loaded(roots)
        if known := _recall(name):
            return known
    with no_collection():
        return _read_code(name, find, roots)


def _read_code(name: str, find: Callable[[str], Module | None] | None, roots: frozenset[str]) -> Code:
    module_name, _, function = name.partition(":")
    sources = Sources(roots, find or _module)
    if sources.module(module_name) is None:
        raise StoreError(
            f"module {module_name} has no source file, so results cannot be keyed by its code",
            cause="it was typed into an interpreter, or run as a script",
            fix="put the function in an importable module",
        )
    reached = walk(sources, module_name, function)
    if not reached.definitions:
        raise StoreError(f"module {module_name} has no function {function}", cause="it was renamed or moved")
    definitions = {name: digest[:12] for name, digest in reached.digests().items()}
    code = Code(reached.digest(), definitions, tuple(sorted(reached.libraries)))
    if find is None:
        read = {one: _fingerprint(one) for one in sources.read}
        _known[name] = read, code
        if roots == {"entropy_core"}:
            remember(name, read, code._asdict())
    return code


def _recall(name: str) -> Code | None:
    """The code of a function as this or an earlier process found it, if no module that was read for it has changed."""
    read, code = _known.get(name, ({}, None))
    if code and all(_fingerprint(one) == known for one, known in read.items()):
        return code
    if remembered := recall(name, _fingerprint):
        read, found = remembered
        code = Code(found["digest"], found["definitions"], tuple(found["libraries"]))
        _known[name] = read, code
        return code
    return None


def read_from(folder: Path) -> Callable[[str], Module | None]:
    """A finder of modules below a folder, for code that is not on Python's path."""
    return lambda name: _parse(name, *_read(path)) if (path := _file(name.split("."), [str(folder)])) else None


def _note_loaded(roots: frozenset[str]) -> None:
    """Read what is loaded now, before an editor has time to change it."""
    names = list(sys.modules)
    if _noted.get(roots) != len(names):
        _noted[roots] = len(names)
        for name in names:
            if name.partition(".")[0] in roots:
                _source(name)


def _module(name: str) -> Module | None:
    """One module; None when the name is not that of a module with a source file."""
    source = _source(name)
    return _parse(name, *source) if source else None


def _source(name: str) -> _Source | None:
    spec = getattr(sys.modules.get(name), "__spec__", None)  # a reload makes a new one
    if spec is not None and name in _loaded and _loaded[name][0] is spec:
        return _loaded[name][1]
    top, *rest = name.split(".")
    try:
        found = importlib.util.find_spec(top)
    except ValueError:  # `__main__` of a script has no spec
        return None
    if found is None:
        return None
    if rest:
        path = _file(rest, found.submodule_search_locations or ())
    else:
        path = Path(found.origin) if found.origin and found.origin.endswith(".py") else None
    if path is None:
        return None
    source = _read(path)
    if spec is not None:
        _loaded[name] = (spec, source)
    return source


def _fingerprint(name: str) -> str:
    """Digest of a module's source; empty where it has none."""
    source = _source(name)
    return _digest(*source) if source else ""


def _file(parts: list[str], locations: Iterable[str]) -> Path | None:
    """Where a module's source is, found without importing it or its parents."""
    for location in locations:
        stem = Path(location, *parts)
        for path in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")):  # a package hides a module, as in Python
            if path.is_file():
                return path
    return None


def _read(path: Path) -> _Source:
    return _Source(path.read_bytes(), path.name == "__init__.py")


@lru_cache(maxsize=1024)
def _digest(content: bytes, is_package: bool) -> str:
    return hashlib.sha256(bytes([is_package]) + content).hexdigest()


_parse = lru_cache(maxsize=512)(Module)

"""Which code made a number: a digest of every project module that a function can reach.

The imports of the function's module are followed without running anything: at any depth of nesting, from module to
module, within the function's own top-level package and `entropy_core`. Each module counts by what Python executes:
comments, formatting, docstrings and `if TYPE_CHECKING:` blocks do not change a digest; a helper, a constant, a default
or an annotation does. Libraries do not count; their versions are recorded elsewhere.

What static analysis cannot see does not count either: a module imported by a computed name, or used as an attribute of
a package that some other module filled (`import entropy_core.numerics as n; n.philox`). Import what you use, by name.
"""

import ast
import functools
import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple

from entropy_core.errors import StoreError


class _Source(NamedTuple):
    digest: str
    imports: frozenset[str]  # dotted names; some are attributes rather than modules


_loaded: dict[str, tuple[ModuleSpec, _Source]] = {}


def code_digest(function: Callable[..., Any]) -> str:
    """Identify a function together with all the project code that it can reach.

    Args:
        function: a plain function defined at the top level of an importable module.

    Returns:
        A SHA-256, 64 hex digits: of the function's name and of `module_digests` of its module. The same on every
        machine and in every Python version that parses the source to the same tree.

    Raises:
        StoreError: the function is a lambda, a nested function or an object: what it closes over cannot be identified.
    """
    if not inspect.isfunction(function) or "<" in function.__qualname__:
        raise StoreError(
            f"{function!r} cannot be identified by its source",
            cause="it is a lambda, a nested function or a callable object, which may close over values",
            way_out="define it with `def` at the top level of a module and pass what it needs as inputs",
        )
    return _sha256([function.__module__, function.__qualname__, module_digests(function.__module__)])


def name_of(function: Callable[..., Any]) -> str:
    """What a manifest calls a function: `package.module:function`."""
    return f"{function.__module__}:{function.__qualname__}"


def module_digests(module_name: str) -> dict[str, str]:
    """Digest a module and every project module that it imports, directly or not.

    A module that this process has loaded is digested once per load, so that the digest is that of the code that runs:
    editing a file under a running process changes nothing until the module is reloaded or the process restarted.

    Args:
        module_name: dotted name of the module to start from; its top-level package counts as part of the project.

    Returns:
        Dotted module name → SHA-256 of its normalised syntax tree, sorted by name. Parent packages are included, as
        Python runs them on import.

    Raises:
        StoreError: the module has no Python source file.
    """
    roots = {module_name.partition(".")[0], "entropy_core"}
    if _source_file(module_name) is None:
        raise StoreError(
            f"module {module_name} has no source file, so results cannot be keyed by its code",
            cause="it was typed into an interpreter, or run as a script",
            way_out="put the function in an importable module",
        )
    for name in [name for name in list(sys.modules) if name.partition(".")[0] in roots]:
        _source(name)  # now, before an editor has time to change what is already loaded

    digests: dict[str, str] = {}
    ahead = [module_name]
    while ahead:
        name = ahead.pop()
        if name in digests or name.partition(".")[0] not in roots:
            continue
        parent = name.rpartition(".")[0]
        if parent:
            ahead.append(parent)
        if source := _source(name):
            digests[name] = source.digest
            ahead.extend(source.imports)
    return dict(sorted(digests.items()))


def _source(name: str) -> _Source | None:
    """The digest and the imports of one module; None when the name is not that of a module with a source file."""
    spec = getattr(sys.modules.get(name), "__spec__", None)  # a reload makes a new one
    if spec is not None and name in _loaded and _loaded[name][0] is spec:
        return _loaded[name][1]
    path = _source_file(name)
    if path is None:
        return None
    stat = path.stat()
    source = _read(name, path, stat.st_mtime_ns, stat.st_size)
    if spec is not None:
        _loaded[name] = (spec, source)
    return source


def _source_file(name: str) -> Path | None:
    """Where the module's source is, found without importing it or its parents."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # `__main__` of a script has no spec
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for location in spec.submodule_search_locations or ():
        stem = Path(location, *rest)
        for path in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")):  # a package hides a module, as in Python
            if path.is_file():
                return path
    return None


@functools.lru_cache(maxsize=1024)
def _read(name: str, path: Path, mtime_ns: int, size: int) -> _Source:
    """Digest a file; the time and the size are there to be part of the cache's key."""
    tree = _Executed().visit(ast.parse(path.read_bytes(), filename=str(path)))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imports: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dotted = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(dotted, package) if node.level else dotted
            imports.add(base)
            imports.update(f"{base}.{alias.name}" for alias in node.names)
    return _Source(_sha256(_plain(tree)), frozenset(imports))


class _Executed(ast.NodeTransformer):
    """Drops what never runs: strings that stand alone (docstrings), and what only a type checker reads."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        test = node.test
        name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
        return node.orelse if name == "TYPE_CHECKING" else node


def _plain(node: Any) -> Any:
    """A syntax tree as lists and strings. `ast.dump` would do, but prints empty fields in some Python versions only."""
    if isinstance(node, ast.AST):
        fields = {name: _plain(value) for name, value in ast.iter_fields(node) if value is not None and value != []}
        return [type(node).__name__, fields]
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return ascii(node)


def _sha256(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

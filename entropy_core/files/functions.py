"""Load functions that a user names in the configuration: `file.py:function`, or `package.module:function`.

They are loaded and called in a separate process, see `isolation`; the file that defines a function is found without
running any of it, and so are the modules beside it that it imports. Results are keyed by the content of these files.
Every load therefore executes the source file again, because a cached import or bytecode may be older than the file.
"""

import ast
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from entropy_core.errors import ConfigError, one_line


def load(what: str, name: str, known: Mapping[str, Any]) -> Any:
    """Load a function by its name.

    Args:
        what: role of the function in error messages: `reward` or `loss`.
        name: a key of `known`, `package.module:function`, or `file.py:function`.
        known: built-in functions by name.

    Returns:
        The function.

    Raises:
        ConfigError: the function does not exist, or cannot be imported.
    """
    if name in known:
        return known[name]
    module_name, attribute = _parts(what, name, known)
    try:
        function = pkgutil.resolve_name(f"{_import(what, module_name).__name__}:{attribute}")
    except (Exception, SystemExit) as error:  # user code may raise anything while it is imported
        where = line_of(error, _file(module_name)) if module_name.endswith(".py") else ""
        reason = f"{type(error).__name__}: {one_line(error)}{where and f' at {where}'}"
        raise ConfigError(f"{what} {name!r} cannot be imported ({reason})", fix=_choices(known)) from error
    if not callable(function):
        raise ConfigError(f"{what} {name!r} is not a function", fix=_choices(known))
    return function


def source_file(what: str, name: str, known: Mapping[str, Any]) -> Path | None:
    """Return the source file of a function.

    Args:
        what: role of the function in error messages, as in `load`.
        name: name of the function, as in `load`.
        known: built-in functions by name.

    Returns:
        The path; None for a built-in function, which the code digest covers.

    Raises:
        ConfigError: the function does not exist, or has no source file.
    """
    if name in known:
        return None
    module_name, _ = _parts(what, name, known)
    if module_name.endswith(".py"):
        if not _file(module_name).is_file():
            fact = f"{what} {name!r} cannot be imported (there is no file {_file(module_name)})"
            raise ConfigError(fact, fix=_choices(known))
        return _file(module_name)
    top, *inner = module_name.split(".")
    spec = importlib.util.find_spec(top) if module_name.strip(".") and not module_name.startswith(".") else None
    if spec is None:
        raise ConfigError(f"{what} {name!r} cannot be imported (there is no module {top})", fix=_choices(known))
    if spec.submodule_search_locations is None:
        file = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") and not inner else None
    else:
        stems = [Path(folder, *inner) for folder in spec.submodule_search_locations]
        paths = [path for stem in stems for path in (stem / "__init__.py", stem.with_name(f"{stem.name}.py"))]
        file = next(filter(Path.is_file, paths), None)
        if file is None:
            fact = f"{what} {name!r} cannot be imported (there is no module {module_name})"
            raise ConfigError(fact, fix=_choices(known))
    if file is None:
        raise ConfigError(
            f"{what} {name!r} has no source file, so results cannot be keyed by its code",
            fix="wrap it in a function of your own, in a .py file",
        )
    return file


def imported_files(file: Path) -> dict[str, Path]:
    """The modules beside a user's file that it imports, and those that they import, found without running any.

    A module is beside a file if it lies in the file's folder, or in the folder that the file's package is in: what an
    `import` statement finds there. What is installed is known by its release, and what is imported otherwise is not
    found.

    Args:
        file: of the user.

    Returns:
        Path of each by its path relative to the file's folder, without the file itself.
    """
    if _is_installed(file):
        return {}
    found: dict[str, Path] = {}
    ahead = [file]
    package = file.parent
    while (package / "__init__.py").is_file() and package != package.parent:  # executed before what is in it
        ahead, package = [*ahead, package / "__init__.py"], package.parent
    found |= {os.path.relpath(path, file.parent): path for path in ahead[1:] if path != file}
    while ahead:
        for other in _imports_of(ahead.pop(), file):
            name = os.path.relpath(other, file.parent)
            if name not in found and other != file:
                found[name] = other
                ahead.append(other)
    return dict(sorted(found.items()))


def _is_installed(file: Path) -> bool:
    """Whether a file belongs to a library, which is known by its release."""
    in_library = {"site-packages", "dist-packages"} & set(file.parts)
    return bool(in_library) or file.is_relative_to(sysconfig.get_path("stdlib"))


def _imports_of(module: Path, file: Path) -> Iterator[Path]:
    """The files beside `file` that the import statements of one module name."""
    try:
        tree = ast.parse(module.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # it cannot be imported either, which says so then
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                for folder in _search_path(file):
                    yield from _files_of(folder, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            folders = [module.parents[node.level - 1]] if node.level else _search_path(file)
            for folder in folders:
                yield from _files_of(folder, parts)
                for alias in node.names:
                    yield from _files_of(folder, [*parts, alias.name])


def _files_of(folder: Path, parts: list[str]) -> Iterator[Path]:
    """The files that an import of a dotted name executes, if it is found in a folder."""
    for count in range(1, len(parts) + 1):
        stem = Path(folder, *parts[:count])
        yield from filter(Path.is_file, (stem / "__init__.py", stem.with_name(f"{stem.name}.py")))


def _search_path(file: Path) -> list[Path]:
    """Where a user's file finds what lies beside it: its folder, and the folder that its package is in."""
    top = file.parent
    while (top / "__init__.py").is_file() and top != top.parent:
        top = top.parent
    return list(dict.fromkeys([file.parent, top]))


def release_of(name: str, known: Mapping[str, Any]) -> str:
    """The installed distribution that a `package.module:function` is in, with its version; empty for the user's own."""
    top = name.partition(":")[0].partition(".")[0]
    if name in known or name.rpartition(":")[0].endswith(".py"):
        return ""
    try:
        return f"{top} {metadata.version(top.replace('_', '-'))}"
    except (metadata.PackageNotFoundError, ValueError):
        return ""


def line_of(error: BaseException, file: Path) -> str:
    """Where in a user's file an exception was raised, or what raised it was called: `file:line`; empty for nowhere.

    The innermost line, be it in the file itself or in a module beside it that it imports.
    """
    own = {str(path) for path in (file, *imported_files(file).values())}
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in own]
    return f"{lines[-1].filename}:{lines[-1].lineno}" if lines else ""


def first_line_of(function: Any, file: Path) -> str:
    """Where in a file a function begins: `file:line`."""
    return f"{file}:{getattr(getattr(function, '__code__', None), 'co_firstlineno', 1)}"


def without_folder(name: str) -> str:
    """Strip the file from `file.py:function`, so that a stage's inputs do not depend on where the file is."""
    return name.rpartition(".py:")[2]


def in_file(name: str, file: Path | None) -> str:
    """Undo `without_folder`: return `file:name`, or `name` if it is a built-in or a `package.module:function`."""
    return name if file is None or ":" in name else f"{file}:{name}"


def _parts(what: str, name: str, known: Mapping[str, Any]) -> tuple[str, str]:
    """Module or file, and function."""
    module_name, colon, attribute = name.rpartition(":")
    if not colon:
        raise ConfigError(f"unknown {what} {name!r}", cause="a misspelt name", fix=_choices(known))
    return module_name, attribute


def _choices(known: Mapping[str, Any]) -> str:
    return f"use one of {', '.join(sorted(known))}, package.module:function, or file.py:function"


def _file(module_name: str) -> Path:
    return Path(module_name).expanduser()


def _import(what: str, module_name: str) -> Any:
    if module_name.endswith(".py"):
        file = _file(module_name)
        beside = _search_path(file)
        sys.path[:0] = [str(folder) for folder in beside if str(folder) not in sys.path]
        package = ".".join(file.parent.relative_to(beside[-1]).parts) if _imports_relatively(file) else ""
        if package:
            importlib.import_module(package)
        return _execute(f"user_{what}_{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}", package, file)
    module = importlib.import_module(module_name)
    origin = getattr(module, "__file__", None) or ""
    if (
        not origin.endswith(".py")
        or _is_installed(Path(origin))
        or module_name.partition(".")[0] == __name__.partition(".")[0]
    ):
        return module
    return _execute(module_name, module.__package__ or "", Path(origin))


def _imports_relatively(file: Path) -> bool:
    tree = ast.parse(file.read_bytes(), str(file))
    return any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


def _execute(name: str, package: str, file: Path) -> ModuleType:
    module = ModuleType(name)
    module.__file__, module.__package__ = str(file), package
    sys.modules[name] = module  # dataclasses look up their module here
    exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    return module

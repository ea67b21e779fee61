"""Load functions that a user names in the configuration: `file.py:function`, or `package.module:function`.

They are loaded and called in a separate process, see `isolation`; the file that defines a function is found without
running any of it. Results are keyed by the content of that file. Every load therefore executes the source file again,
because a cached import or bytecode may be older than the file.
"""

import importlib
import importlib.util
import pkgutil
import re
import sys
import traceback
from collections.abc import Mapping
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


def line_of(error: BaseException, file: Path) -> str:
    """Where in a file an exception was raised, or what raised it was called: `file:line`; empty for nowhere."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}:{lines[-1]}" if lines else ""


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
        stem = re.sub(r"\W", "_", _file(module_name).stem)
        return _execute(f"user_{what}_{stem}", "", _file(module_name))
    module = importlib.import_module(module_name)
    file = getattr(module, "__file__", None) or ""
    if not file.endswith(".py") or module_name.partition(".")[0] == __name__.partition(".")[0]:
        return module
    return _execute(module_name, module.__package__ or "", Path(file))


def _execute(name: str, package: str, file: Path) -> ModuleType:
    module = ModuleType(name)
    module.__file__, module.__package__ = str(file), package
    sys.modules[name] = module  # dataclasses look up their module here
    exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    return module

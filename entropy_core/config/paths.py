"""Paths in a configuration start at the folder of the file that names them.

Pydantic is given that folder as the context of a validation, and each type below makes the path absolute while its
field is validated, so that a path that leads nowhere is reported together with every other error. Without a context a
path stays as it is.
"""

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    JsonValue,
    PlainSerializer,
    Tag,
    ValidationInfo,
    WithJsonSchema,
)

from entropy_core.files.hub_cache import cached_snapshot
from entropy_core.losses.interventions import asked_for
from entropy_core.prompts.files import SUFFIXES
from entropy_core.prompts.pools import KNOWN


@dataclass(frozen=True)
class Origin:
    """Where a configuration comes from: the context of its validation.

    Args:
        folder: that relative paths start at.
        must_exist: refuse paths that lead nowhere; without it they are only made absolute.
    """

    folder: Path
    must_exist: bool = False

    def locate(self, path: str) -> str:
        """The path from the root; `~` is the user's home, and `..` a step back in the text."""
        return os.path.normpath(self.folder.absolute() / os.path.expanduser(path))


def _with_origin(locate: Callable[[str, Origin], str]) -> AfterValidator:
    """Validate with the origin, where there is one; an empty text names nothing."""

    def validate(text: str, info: ValidationInfo) -> str:
        return locate(text, info.context) if text and isinstance(info.context, Origin) else text

    return AfterValidator(validate)


def _checkpoints(pattern: str, origin: Origin) -> str:
    literal = origin.locate(pattern)
    if os.path.isdir(literal):
        return literal
    found = Origin(Path(glob.escape(str(origin.folder.absolute())))).locate(pattern)
    if origin.must_exist and not any(map(os.path.isdir, glob.iglob(found, recursive=True))):
        raise ValueError(f"no directory matches {literal}; a run's checkpoints are usually RUN/checkpoint-*")
    return found


def _directory(path: str, origin: Origin) -> str:
    located = origin.locate(path)
    if origin.must_exist and not os.path.isdir(located):
        raise ValueError(f"there is no directory {located}")
    return located


def _interpreter(path: str, origin: Origin) -> str:
    located = origin.locate(path)
    if origin.must_exist and not os.access(located, os.X_OK):
        raise ValueError(f"there is no program {located}")
    return located


def _model(path: str, origin: Origin) -> str:
    located = origin.locate(path)
    if os.path.isdir(located):
        return located
    if found := cached_snapshot(path, "models"):
        return str(found)
    if origin.must_exist:
        raise ValueError(f"there is no directory {located}, and no model {path} in the hub cache")
    return located


FILL_IN = "FILL_IN"
"""Stands in a file of `entropy-probe init` for what no checkpoint records."""


def _filled_in(said: str, what: str) -> str:
    if said == FILL_IN:
        raise ValueError(f"say here {what}, which its checkpoints do not record")
    return said


def _dataset(name: str, origin: Origin) -> str:
    if name.endswith(SUFFIXES):
        return _file(name, origin)
    located = origin.locate(name)
    return located if name not in KNOWN and os.path.isdir(located) else name


def _function(name: str, origin: Origin) -> str:
    file, colon, function = name.rpartition(":")
    return f"{_file(file, origin)}:{function}" if colon and file.endswith(".py") else name


def _file(path: str, origin: Origin) -> str:
    located = origin.locate(path)
    if origin.must_exist and not os.path.isfile(located):
        raise ValueError(f"there is no file {located}")
    return located


def _rollouts(path: str, origin: Origin) -> str:
    located = origin.locate(path)
    if origin.must_exist and not os.path.exists(located):
        raise ValueError(f"there is no file or folder {located}")
    return located


def _known_intervention(entry: str | dict[str, JsonValue]) -> str | dict[str, JsonValue]:
    asked_for(entry)
    return entry


def _store(path: str, origin: Origin) -> str:
    located = origin.locate(path)
    if origin.must_exist and os.path.exists(located) and not os.path.isdir(located):
        raise ValueError(f"{located} is a file, and the store is a folder")
    return located


CheckpointPattern = Annotated[str, _with_origin(_checkpoints)]
"""A directory, or a pattern that matches directories."""

Interpreter = Annotated[str, _with_origin(_interpreter)]
"""The Python of another environment; empty: none."""

ModelName = Annotated[str, _with_origin(_model)]
"""The directory of a model, or its name in the hub cache, of which it becomes the snapshot; empty: none."""

Directory = Annotated[str, _with_origin(_directory)]
"""A directory that is there; empty: none."""

DatasetName = Annotated[
    str,
    AfterValidator(lambda name: _filled_in(name, "which prompts the run was trained on")),
    _with_origin(_dataset),
]
"""A known dataset, one of the hub, or the path of a prompt file or folder."""

FunctionName = Annotated[
    str,
    AfterValidator(lambda name: _filled_in(name, "which function rewarded the responses of the run")),
    _with_origin(_function),
]
"""A known name, `package.module:function`, or `file.py:function`."""

FunctionNames = Annotated[
    Annotated[FunctionName, Field(min_length=1), Tag("")]
    | Annotated[list[Annotated[FunctionName, Field(min_length=1)]], Field(min_length=1, max_length=100), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else ""),
    AfterValidator(lambda value: value[0] if isinstance(value, list) and len(value) == 1 else value),
    PlainSerializer(lambda value: [value] if isinstance(value, str) else value, when_used="json"),
    WithJsonSchema({"type": "array", "items": {"type": "string"}}),
]
"""One function, or a list of several; a form has a list."""

RolloutsPath = Annotated[str, _with_origin(_rollouts)]
"""A file or a folder of recorded rollouts; empty: none."""

InterventionEntry = Annotated[
    Annotated[str, _with_origin(_function), Tag("")] | Annotated[dict[str, JsonValue], Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, dict) else ""),
    AfterValidator(_known_intervention),
    WithJsonSchema({"type": "string"}),
]
"""`published`, a name, `name=value`, `file.py:function`, or a mapping of one name to its value; a form has texts."""

StoreFolder = Annotated[str, _with_origin(_store)]
"""A folder that is made when something is first written to it."""

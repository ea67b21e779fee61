"""Read a configuration from plain values or from a YAML file, and report all of its errors together."""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from entropy_core.config import plain_yaml
from entropy_core.config.lab import InterventionsRequest
from entropy_core.config.paths import Origin
from entropy_core.config.schema import ProbeConfig, VarianceRequest
from entropy_core.errors import ConfigError

_Model = TypeVar("_Model", bound=BaseModel)
_MOST_LISTED = 20
"""Errors that a message names; a list can have the same error in each of a thousand entries."""
_TYPES = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
}


def parse_config(values: Any, source: str = "the configuration", origin: Origin | None = None) -> ProbeConfig:
    """Parse plain values into a `ProbeConfig`.

    Args:
        values: nested dictionaries, as a YAML parser returns them.
        source: name of the configuration in error messages.
        origin: folder that relative paths start at; None leaves paths as they are, without checking that they exist.

    Returns:
        The configuration.

    Raises:
        ConfigError: a key is unknown or missing, a value has the wrong type or is out of range, or a path does not
            exist; several errors are listed one per line.
    """
    return _parse(ProbeConfig, values, source, origin, [])


def parse_request(values: Any, origin: Origin | None = None) -> VarianceRequest:
    """Parse plain values into a `VarianceRequest`. Raises ConfigError under the conditions of `parse_config`."""
    return _parse(VarianceRequest, values, "the request", origin, [])


def parse_interventions(values: Any, origin: Origin | None = None) -> InterventionsRequest:
    """Parse plain values into an `InterventionsRequest`. Raises ConfigError as `parse_config` does."""
    return _parse(InterventionsRequest, values, "the request", origin, [])


def load_config(path: Path | str, must_exist: bool = False, checkpoints: Sequence[str] = ()) -> ProbeConfig:
    """Load a `ProbeConfig` from a YAML file; relative paths in it are resolved against the folder of the file.

    Args:
        path: the YAML file.
        must_exist: refuse a configuration with a path that does not exist.
        checkpoints: take the place of those in the file, if there are any; absolute paths.

    Returns:
        The configuration, with absolute paths.

    Raises:
        ConfigError: the file is missing or is not YAML, or `parse_config` would raise it.
    """
    values, repeated = plain_yaml.read(path)
    if checkpoints and isinstance(values, dict):
        values = values | {"checkpoints": [*checkpoints]}
    return _parse(ProbeConfig, values, str(path), Origin(Path(path).parent, must_exist), repeated)


def _parse(model: type[_Model], values: Any, source: str, origin: Origin | None, problems: list[str]) -> _Model:
    if values is None:
        raise ConfigError(f"{source} is empty", fix="begin with `checkpoints: [RUN/checkpoint-*]`")
    try:
        parsed = model.model_validate(values, context=origin)
    except ValidationError as error:
        problems = [*problems, *(_problem(item, model) for item in error.errors())]
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON and YAML can spell
        raise ConfigError(f"{source} has a text that is no Unicode: {error.object!r:.80}", fix="correct it") from None
    if not problems:
        return parsed
    more = [f"and {len(problems) - _MOST_LISTED} more"] if len(problems) > _MOST_LISTED else []
    lines = "".join(f"\n  {line}" for line in [*problems[:_MOST_LISTED], *more])
    listed = f": {problems[0]}" if len(problems) == 1 else f" has {len(problems)} errors:{lines}"
    raise ConfigError(
        source + listed,
        fix="correct " + ("it" if len(problems) == 1 else "them") + "; docs/configuration.md lists all keys",
    )


_TAGS = {"", "list", "mapping"}
"""What pydantic adds to a key that may be one value or several."""


def _problem(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Return the key of a validation error and the reason, without a full stop."""
    key = ".".join(part for part in map(str, error["loc"]) if part not in _TAGS)
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_nearest(key, model)}"
        case "missing":
            return f"{key}: required key is missing"
        case "model_type" | "model_attributes_type" | "dict_type" if error["input"] is None:
            return f"{key}: is empty; add keys to it, or remove it"
        case "model_type" | "model_attributes_type" | "dict_type":  # pydantic would name its class
            return f"{key}: must be a mapping of keys to values" if key else "must be a mapping of keys to values"
        case "value_error":
            return f"{key}: {error['msg'].removeprefix('Value error, ')}"
        case "string_pattern_mismatch":
            return f"{key}: must match {error['ctx']['pattern']}, not {_show(error['input'])}"
        case "string_too_long" | "string_too_short":
            return f"{key}: {error['msg'].removeprefix('String should ').replace('have', 'must have')}"
        case "too_long" | "too_short":
            bound = "at most {max_length}" if error["type"] == "too_long" else "at least {min_length}"
            return f"{key}: must have {bound} entries, not {{actual_length}}".format(**error["ctx"])
        case kind:
            wanted = _TYPES.get(kind) or error["msg"].removeprefix("Input should be ")
            return f"{key}: must be {wanted}, not {_show(error['input'])}"


def _nearest(key: str, model: type[BaseModel]) -> str:
    """Name the known key closest to a misspelt one, from the same section if possible; empty if none is close."""
    section, _, name = key.rpartition(".")
    known = list(_keys(model))
    here = [other for other in known if other.rpartition(".")[0] == section]
    for candidates in (here, known):
        by_name = {other.rpartition(".")[2].lower(): other for other in candidates}
        if near := get_close_matches(name.lower(), by_name, n=1, cutoff=0.75):
            return f"; the closest known key is {by_name[near[0]]}"
    return ""


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _show(value: Any) -> str:
    """Format a wrong value as YAML would write it, shortened."""
    if isinstance(value, str):
        value = value if len(value) <= 60 else value[:59] + "…"
        return f"the string {json.dumps(value, ensure_ascii=False)}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else reprlib.repr(value)

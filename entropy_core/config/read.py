"""A configuration from plain values or from a YAML file; everything that is wrong in it is reported together."""

import json
import reprlib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from entropy_core.config import plain_yaml
from entropy_core.config.paths import Origin
from entropy_core.config.schema import ProbeConfig, VarianceRequest
from entropy_core.errors import ConfigError

_Model = TypeVar("_Model", bound=BaseModel)
_TYPES = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
}


def parse_config(values: Any, source: str = "the configuration", origin: Origin | None = None) -> ProbeConfig:
    """A `ProbeConfig` from plain values.

    Args:
        values: nested dictionaries as YAML gives them.
        source: how to call them in an error.
        origin: where they come from; without it paths stay as they are, and nobody looks for them.

    Returns:
        The configuration.

    Raises:
        ConfigError: on an unknown key, a missing one, a value of another type or out of range, or a path that leads
            nowhere; names each of them, on a line of its own where there are several.
    """
    return _parsed(ProbeConfig, values, source, origin, [])


def parse_request(values: Any, origin: Origin | None = None) -> VarianceRequest:
    """A `VarianceRequest` from plain values. Raises ConfigError as `parse_config` does."""
    return _parsed(VarianceRequest, values, "the request", origin, [])


def load_config(path: Path | str, must_exist: bool = False) -> ProbeConfig:
    """A `ProbeConfig` from a YAML file, its paths made absolute: they start at the folder of the file.

    Args:
        path: of the file.
        must_exist: refuse a path that leads nowhere.

    Raises:
        ConfigError: the file is missing or is not YAML; or as `parse_config`.
    """
    values, repeated = plain_yaml.read(path)
    return _parsed(ProbeConfig, values, str(path), Origin(Path(path).parent, must_exist), repeated)


def _parsed(model: type[_Model], values: Any, source: str, origin: Origin | None, problems: list[str]) -> _Model:
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
    listed = f": {problems[0]}" if len(problems) == 1 else f" has {len(problems)} errors:\n  " + "\n  ".join(problems)
    raise ConfigError(
        source + listed,
        fix="correct " + ("it" if len(problems) == 1 else "them") + "; docs/configuration.md lists all keys",
    )


def _problem(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Which key is wrong, and why, without the full stop."""
    key = ".".join(map(str, error["loc"]))
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_nearest(key, model)}"
        case "missing":
            return f"{key}: has to be given"
        case "model_type" | "model_attributes_type" | "dict_type" if error["input"] is None:
            return f"{key}: is empty; give it keys, or leave it out"
        case "model_type" | "model_attributes_type" | "dict_type":  # pydantic would name its class
            return f"{key}: must be keys with their values" if key else "it is not a list of keys with their values"
        case "value_error":
            return f"{key}: {error['msg'].removeprefix('Value error, ')}"
        case "too_long" | "too_short":
            bound = "at most {max_length}" if error["type"] == "too_long" else "at least {min_length}"
            return f"{key}: must have {bound} entries, not {{actual_length}}".format(**error["ctx"])
        case kind:
            wanted = _TYPES.get(kind) or error["msg"].removeprefix("Input should be ")
            return f"{key}: must be {wanted}, not {_shown(error['input'])}"


def _nearest(key: str, model: type[BaseModel]) -> str:
    """The known key that was meant, if one is near: of the same section, or else of another one."""
    section, _, name = key.rpartition(".")
    known = list(_keys(model))
    here = [other for other in known if other.rpartition(".")[0] == section]
    for candidates in (here, known):
        by_name = {other.rpartition(".")[2].lower(): other for other in candidates}
        if near := get_close_matches(name.lower(), by_name, n=1, cutoff=0.75):
            return f"; the nearest known one is {by_name[near[0]]}"
    return ""


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _shown(value: Any) -> str:
    """A wrong value as a file would have it, shortened."""
    if isinstance(value, str):
        value = value if len(value) <= 60 else value[:59] + "…"
        return f"the text {json.dumps(value, ensure_ascii=False)}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "nothing" if value is None else reprlib.repr(value)

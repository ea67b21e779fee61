"""A configuration from plain values or from a YAML file; what is wrong in it is said of all its keys at once."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from entropy_core.config import ProbeConfig, VarianceRequest
from entropy_core.errors import ConfigError

_Model = TypeVar("_Model", bound=BaseModel)


def parse_config(values: Any, source: str = "the configuration") -> ProbeConfig:
    """A `ProbeConfig` from plain values.

    Args:
        values: nested dictionaries as YAML gives them.
        source: how to call them in an error.

    Returns:
        The configuration.

    Raises:
        ConfigError: on an unknown key, a missing one, or a value out of range; names each of them.
    """
    if values is None:
        raise ConfigError(f"{source} is empty (top level)", way_out="begin with `checkpoints: [RUN/checkpoint-*]`")
    return _parsed(ProbeConfig, values, source)


def parse_request(values: Any) -> VarianceRequest:
    """A `VarianceRequest` from plain values. Raises ConfigError as `parse_config` does."""
    return _parsed(VarianceRequest, values, "the request")


def load_config(path: Path | str) -> ProbeConfig:
    """A `ProbeConfig` from a YAML file.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds a wrong value.
    """
    return parse_config(read_yaml(path), str(path))


def read_yaml(path: Path | str) -> Any:
    """What a YAML file says, as plain values.

    Raises:
        ConfigError: the file is missing, or is not YAML.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", way_out="give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {problem}", way_out="correct the file") from None


def _parsed(model: type[_Model], values: Any, source: str) -> _Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            f"{source} has {error.error_count()} wrong value(s): {_summary(error)}",
            way_out="correct the named keys; docs/configuration.md lists all of them",
        ) from None


def _summary(error: ValidationError) -> str:
    entries = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        elif item["type"] in {"model_type", "model_attributes_type"}:  # pydantic would name its class
            message = "is empty: give it keys, or leave it out" if item["input"] is None else "is not a list of keys"
        else:
            message = item["msg"].removeprefix("Value error, ")
        entries.append(f"{where}: {message}")
    return "; ".join(entries)

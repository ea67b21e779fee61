"""What all parts of the configuration are: frozen, typed, without keys that nobody knows."""

from collections import Counter
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, lt=2**53)]  # what a browser can hold exactly
Value = TypeVar("Value")
DISTINCT: dict[str, Any] = {"uniqueItems": True}  # for the form: what a validator says later is said at once


def each_once(values: list[Value]) -> list[Value]:
    """A list without repetition; raises ValueError otherwise."""
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is listed twice")
    return values


class Section(BaseModel):
    """A part of the configuration."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        strict=True,
        validate_default=True,  # a default path starts at the same folder as one that is written
        revalidate_instances="always",
    )

"""What a manifest must look like for those who read it, wherever it comes from: its seal can be computed by anybody."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


def _canonical(value: Any) -> Any:
    """Inputs as `artifact.canonical` makes them; raises ValueError on another form of its two tags."""
    if isinstance(value, dict):
        if set(value) in ({"float"}, {"artifact", "digest"}) and not all(isinstance(of, str) for of in value.values()):
            raise ValueError("an input is tagged as what it is not")
        for item in value.values():
            _canonical(item)
    elif isinstance(value, list):
        for item in value:
            _canonical(item)
    return value


_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
_Key = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True)


class _File(_Form):
    bytes: Annotated[int, Field(ge=0)]
    sha256: _Digest


class _Reference(_Form):
    stage: _Name
    key: _Key
    digest: _Digest


class _Manifest(_Form):
    format: int
    stage: _Name
    key: _Key
    code: str
    function: str
    libraries: dict[str, str]
    definitions: dict[str, str]
    inputs: Annotated[dict[str, Any], AfterValidator(_canonical)]
    upstream: list[_Reference]
    summary: dict[str, Any]
    execution: dict[str, Any]
    files: dict[str, _File]
    digest: _Digest
    created: Annotated[str, Field(pattern=r"^[0-9T:.+-]{16,40}$")]
    wall_seconds: _Number


def require_form(manifest: Mapping[str, Any]) -> None:
    """Raises ValueError if something that is read of a manifest is missing in it, or is of another kind."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

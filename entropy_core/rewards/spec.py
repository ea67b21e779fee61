"""Which function a reward is, and all that its values depend on."""

from pydantic import BaseModel, ConfigDict


class RewardSpec(BaseModel):
    """A reward: all of it is part of the key of the rewards of U.

    Attributes:
        name: of the reward; of a user's `file.py:function`, the function alone.
        source: digest of the file that defines it; empty for a reward of this package.
        imports: digests of the modules beside that file that it imports, by their paths relative to it.
        library: the library that it leaves the decision to, with its version; empty where there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    source: str = ""
    imports: dict[str, str] = {}
    library: str = ""

"""What a user asks of the intervention lab."""

from typing import Literal

from pydantic import Field

from entropy_core.config.paths import InterventionEntry, StoreFolder
from entropy_core.config.section import Section


class LabConfig(Section):
    """How the `interventions` are tried: each is compared with the run as it is, on the same E and U."""

    predict: Literal["all", "none"] = Field(
        "all",
        description="Take the exact step of the optimizer under every intervention, a backward pass over U each; none: "
        "screen only, with the denominators of the run.",
    )
    measure: str = Field(
        "best 5",
        pattern=r"^(all|none|best [1-9][0-9]{0,3})$",
        description="Whose ΔH to measure, a forward pass over E each: all, none, or the `best N`, those under which "
        "the entropy changes most upwards by the first half of E.",
    )
    margin: float = Field(
        0.1,
        gt=0,
        le=1000,
        description="A difference of less than this share of |δH₁| does not matter: an intervention whose whole "
        "interval is within it does not act.",
    )


class InterventionsRequest(Section):
    """Interventions on a recorded sweep; what it computed before is reused. It needs the checkpoints."""

    run: str = Field(
        "latest", min_length=1, description="Id of a recorded run, or latest: the sweep that finished last."
    )
    artifacts: StoreFolder = Field("artifacts", min_length=1, description="Folder of the store and of the results.")
    interventions: list[InterventionEntry] = Field(
        ["published"], min_length=1, max_length=1000, description="What is tried, see `interventions` above."
    )
    lab: LabConfig = LabConfig()

"""What a user asks of the intervention lab."""

from typing import Annotated, Literal

from pydantic import Field

from entropy_core.config.paths import InterventionEntry, StoreFolder
from entropy_core.config.section import Section


class RehearseConfig(Section):
    """Real steps from the last checkpoint, each on fresh responses: for the run as it is, and under interventions."""

    steps: int = Field(0, ge=0, le=10_000, description="Optimizer steps to take; 0: no rehearsal.")
    seeds: int = Field(
        3,
        ge=1,
        le=1000,
        description="How often the steps are taken anew, with other prompts and draws; from one seed, all "
        "interventions have the same random numbers. Bands need two.",
    )
    interventions: str = Field(
        "best 3",
        pattern=r"^(all|none|best [1-9][0-9]{0,3})$",
        description="Which of the `interventions` are rehearsed beside the run as it is: all, none, or the `best N`, "
        "those under which δH₁ is largest by the first half of E.",
    )
    every: int = Field(
        2,
        ge=1,
        le=10_000,
        description="E is sampled, scored and rewarded after every so many steps, and after the last.",
    )
    floor: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="When does the entropy reach this floor, in nats per token? 0: not asked.",
    )
    learning_rates: list[Annotated[float, Field(ge=0, le=1e6)]] = Field(
        default_factory=list,
        max_length=10_000,
        description="Learning rate of each step over that of the first; the last one holds for all steps after it. "
        "[]: as the trainer's schedule goes on where its files say it, else 1.",
    )

    @property
    def measured(self) -> int:
        """How often E is measured along the rehearsals of one intervention; 0 if there are none."""
        return self.seeds * (1 + -(-self.steps // self.every)) if self.steps else 0


class LabConfig(Section):
    """How the `interventions` are tried: each is compared with the run as it is, on the same E and U."""

    predict: Literal["all", "none"] = Field(
        "all",
        description="Take the exact step of the optimizer under every intervention, at most a backward pass over U "
        "each and two over E; none: screen only, with the denominators of the run, without intervals.",
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
    rehearse: RehearseConfig = RehearseConfig()


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

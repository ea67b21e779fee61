"""What a user says of the steps that follow one rollout."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from entropy_core.config.section import Section
from entropy_core.losses.phase_interventions import asked_in_phase


def _can_be_followed(entry: str | dict[str, JsonValue]) -> str | dict[str, JsonValue]:
    asked_in_phase(entry)
    return entry


PhaseEntry = Annotated[
    Annotated[str, Tag("")] | Annotated[dict[str, JsonValue], Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, dict) else ""),
    AfterValidator(_can_be_followed),
    WithJsonSchema({"type": "string"}),
]
"""A name, `name=value`, or a mapping of one name to its value; a form has texts."""


class PhaseConfig(Section):
    """The optimizer steps that a trainer takes on one rollout: U is then the whole rollout, cut into minibatches."""

    minibatches: int = Field(
        1,
        ge=1,
        le=10_000,
        description="Into how many minibatches U is cut, with a step on each (TRL: steps_per_generation over "
        "gradient_accumulation_steps).",
    )
    epochs: int = Field(
        1, ge=1, le=1000, description="How often the steps on all minibatches are repeated (TRL: num_iterations)."
    )
    order: Literal["shuffled", "as_drawn"] = Field(
        "shuffled",
        description="In which order U is cut. shuffled: response by response, once for all epochs, as TRL does. "
        "as_drawn: prompt after prompt.",
    )
    shuffle_seed: int = Field(
        -1, ge=-1, lt=2**53, description="Seed of the order; no trainer saves its own. -1: batch_config.U_batch_seed."
    )
    epsilon: float = Field(
        0.2, ge=0, le=1, description="Importance ratios of responses with A < 0 are clipped at 1 − ε from below."
    )
    epsilon_high: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Ratios of responses with A > 0 are clipped at 1 + ε_high from above; 0: the same as epsilon.",
    )
    delta: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Dual clip: ratios of responses with A < 0 are clipped at δ from above, above 1; 0: none.",
    )
    off_policy_mask_threshold: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Responses with A < 0 lose their policy term where the mean of ℓ_old − ℓ is larger; 0: none do.",
    )
    interventions: list[PhaseEntry] = Field(
        default_factory=list,
        max_length=100,
        description="What might change the entropy along the phase, each followed from the rollout to the last step: "
        "as under `interventions`, or `epsilon`, `epsilon_high`, `delta`, `off_policy_mask_threshold` with a value.",
    )
    learning_rates: list[Annotated[float, Field(ge=0, le=1e6)]] = Field(
        default_factory=list,
        max_length=10_000,
        description="Learning rate of each step over that of the first; the last one holds for all steps after it. "
        "[]: as the trainer's schedule goes on where its files say it, else 1.",
    )
    follow: bool = Field(
        False, description="Take these steps, one after the other, and measure the entropy after each of them."
    )

    @field_validator("follow")
    @classmethod
    def _asked_for(cls, follow: bool, info: ValidationInfo) -> bool:
        unasked = {name: field.get_default(call_default_factory=True) for name, field in cls.model_fields.items()}
        asked = [name for name, value in info.data.items() if value != unasked[name]]
        if asked and not follow:
            raise ValueError(f"{' and '.join(asked)}: of a phase that is not followed. Set follow: true")
        return follow

    @property
    def followed(self) -> int:
        """How often E is measured along the phase: for the run as it is, and under each intervention."""
        return self.steps * (1 + len(self.interventions))

    @property
    def steps(self) -> int:
        """Number of steps on one rollout; 0 if they are not followed."""
        return self.minibatches * self.epochs if self.follow else 0

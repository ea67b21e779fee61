"""What a user asks for about the sampling of E and U."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from entropy_core.config.section import Section


class SamplingConfig(Section):
    """The distribution that is sampled, scored and differentiated: softmax(z/τ), nothing cut off."""

    temperature: float = Field(1.0, ge=1e-6, le=100, description="τ, applied before the softmax everywhere.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Must be 1: the sampled and the scored distribution must be the same.",
        json_schema_extra={"minimum": 1},
    )
    max_new_tokens: int = Field(64, ge=1, le=1_000_000, description="A response is cut here if no EOS came.")
    stop_strings: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        max_length=20,
        description="A response also ends with the token whose text completes one of these, as your trainer's may.",
    )
    sampler: Literal["exact", "bf16", "vllm"] = Field(
        "exact",
        description="What draws E. exact: the policy as it is scored. bf16: its weights and arithmetic in bfloat16, "
        "faster on a GPU; what it draws is weighted by the ratio of the two probabilities. vllm: the same with vLLM, "
        "in an environment of its own (`execution.vllm_python`).",
    )
    proposal_temperature: float = Field(
        0.0,
        ge=0,
        le=100,
        description="Draw a share of E at this temperature, so that rare responses are seen, and weight all of E by "
        "the ratio of the policy to the mixture; 0: none. U is not affected.",
    )
    proposal_share: float = Field(
        0.3,
        gt=0,
        le=1,
        description="The share of E that is drawn at `proposal_temperature`. No weight is above 1/(1 - share).",
    )
    do_sample: Literal[True] = Field(True, description="Entropy of a greedy policy is not estimated.")
    gen_batch_size: int = Field(
        512, ge=1, le=1_000_000, description="Sequences decoded together; does not change the result."
    )
    tf_batch_size: int = Field(
        256, ge=1, le=1_000_000, description="Sequences per teacher-forced pass, at most; does not change the result."
    )
    tf_batch_tokens: int = Field(
        65_536,
        ge=1,
        le=1_000_000_000,
        description="Tokens per teacher-forced pass, padding included, at most, so that long answers take no more "
        "memory than short ones; does not change the result.",
    )

    @property
    def own_sampler(self) -> bool:
        """Whether another law than the policy draws E."""
        return self.sampler != "exact" or self.proposal_temperature > 0

    @field_validator("top_p")
    @classmethod
    def _whole_law(cls, top_p: float) -> float:
        if top_p < 1:
            raise ValueError(
                f"it is {top_p}, but E must be sampled from the policy itself: under a cut-off distribution the "
                "entropy and its derivative are those of another policy. Set top_p: 1.0"
            )
        return top_p

"""Which policy, and how it is computed: what every stage that asks a policy is told."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from entropy_core.policy.model import Policy
from entropy_core.policy.pretrained import load_policy, use_full_precision

if TYPE_CHECKING:
    from entropy_core.execution import Execution


class PolicySpec(BaseModel):
    """A policy as a probability distribution over responses: all of it is part of the key of what was computed with it.

    Attributes:
        weights: content digest of the checkpoint's model, or of the adapter.
        base: content digest of the base model under an adapter; empty for a full model.
        dtype: of the parameters and the arithmetic.
        attn_implementation: the attention that has a forward-mode derivative.
        temperature: τ; the policy is softmax(z/τ).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    weights: str
    base: str = ""
    dtype: Literal["float32", "float64"]
    attn_implementation: Literal["eager"]
    temperature: float = Field(gt=0)


def policy_of(spec: PolicySpec, execution: "Execution") -> Policy:
    """Load a policy, in full precision.

    Args:
        spec: which.
        execution: knows where its files lie, the device, and how much memory logits may take.

    Returns:
        The policy; the same object as the last time, as long as its files are the same.
    """
    use_full_precision()
    directory = execution.paths[spec.weights]
    base = execution.paths[spec.base] if spec.base else None
    digest, files = spec.weights + spec.base, tuple(execution.stamps([spec.weights, spec.base]).items())
    policy = load_policy(directory, digest, spec.dtype, spec.attn_implementation, execution.device, base, files)
    policy.limit_logits(execution.head_chunk_megabytes)
    policy.recompute_activations = execution.recompute_activations
    return policy

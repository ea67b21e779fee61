"""Specification of a policy, an input of every stage that uses the policy."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from entropy_core.numerics.proposal import Proposal
from entropy_core.policy.model import Policy
from entropy_core.policy.pretrained import load_policy, use_full_precision
from entropy_core.store.data_files import VECTORS
from entropy_core.store.inputs import RehearsalStep, Weights

if TYPE_CHECKING:
    from entropy_core.execution import Execution


class PolicySpec(BaseModel):
    """A policy as a probability distribution over responses; all fields are part of the keys of its results.

    Attributes:
        weights: content digest of the checkpoint's model, or of the adapter; or the artifact of load-weights, where the
            checkpoint has its weights in shards.
        base: content digest of an adapter's base model; empty for a full model.
        step: artifact of rehearsal-step: the policy after it and those before it; None: the policy that was saved.
        dtype: data type of the parameters and of the arithmetic; bfloat16 only to sample from.
        attn_implementation: attention in forward mode.
        temperature: τ; the policy is softmax(z/τ) for logits z.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    weights: str | Weights
    base: str = ""
    step: RehearsalStep | None = None
    dtype: Literal["bfloat16", "float32", "float64"]
    attn_implementation: Literal["blockwise", "eager"]
    temperature: float = Field(gt=0)


class ProposalSpec(BaseModel):
    """A law that draws E in place of the policy, see `numerics.proposal.Proposal`; a part of the keys of its results.

    Attributes:
        temperature: temperature of the broad component.
        share: share of the responses that come from it; 0 if only the numbers of the sampler are less exact.
        engine: what draws, with its versions, such as `vllm 0.32.0, torch 2.13.0`; empty for our own decoding.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    temperature: float = Field(gt=0)
    share: float = Field(ge=0, le=1)
    engine: str = ""

    @property
    def law(self) -> Proposal:
        """The mixture."""
        return Proposal(self.temperature, self.share)


def policy_of(spec: PolicySpec, execution: "Execution") -> Policy:
    """Load a policy, and make torch compute in full precision.

    Args:
        spec: the policy to load.
        execution: paths of the files, device, and memory limit of logits.

    Returns:
        The policy; the same object as in the last call if the specification and the files are unchanged.
    """
    use_full_precision()
    if isinstance(spec.weights, str):
        directory, weights = execution.paths[spec.weights], spec.weights
    else:
        verified = spec.weights.path(f"{VECTORS}model.safetensors")
        directory, weights = verified.parent, spec.weights.digest
    base = execution.paths[spec.base] if spec.base else None
    digest, files = weights + spec.base, tuple(execution.stamps([weights, spec.base]).items())
    how = spec.dtype, spec.attn_implementation, execution.device
    policy = load_policy(directory, digest, *how, base, files, execution.devices_per_policy, spec.step)
    policy.limit_logits(execution.head_chunk_megabytes)
    policy.recompute_activations = execution.recompute_activations
    return policy

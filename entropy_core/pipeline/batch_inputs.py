"""The inputs of the stages that sample and reward the batches of a checkpoint."""

from collections.abc import Sequence

from entropy_core.config.schema import ProbeConfig
from entropy_core.pipeline.preflight import CheckpointToProbe
from entropy_core.pipeline.runner import Inputs
from entropy_core.pipeline.specs import reward_spec
from entropy_core.policy.spec import PolicySpec
from entropy_core.store.artifact import Artifact


def responses_of_e(config: ProbeConfig) -> tuple[int, int]:
    """Return the number of responses in E, and how many of them are to the same prompt and so not independent."""
    batch = config.batch_config
    if batch.E_sampling_mode == "replacement":
        return batch.E_total_sequences, 1
    return batch.B_E_values[0] * batch.G, batch.G


def sampled_e(config: ProbeConfig, policy: PolicySpec, pool: Artifact, seed: int) -> Inputs:
    """The inputs of sample-e-batch that all shards share, drawn by the policy itself."""
    return {
        "policy": policy,
        "proposal": None,
        "prompts": pool,
        "batch": "E",
        "mode": config.batch_config.E_sampling_mode,
        "responses_per_prompt": responses_of_e(config)[1],
        "seed": seed,
    }


def sampled_u(config: ProbeConfig, policy: PolicySpec, pool: Artifact, seed: int) -> Inputs:
    """The inputs of sample-u-batch that all shards share."""
    return {
        "policy": policy,
        "proposal": None,
        "prompts": pool,
        "batch": "U",
        "mode": "distinct",
        "responses_per_prompt": config.batch_config.G,
        "seed": seed,
    }


def rewarded(
    config: ProbeConfig, checkpoint: CheckpointToProbe, sequences: Sequence[Artifact], pool: Artifact
) -> Inputs:
    """The inputs of the rewards of some sequences, which are summed with their weights."""
    update = config.update
    weighted = update.reward_weights and set(update.reward_weights) != {1.0}
    return {
        "sequences": sequences,
        "prompts": pool,
        "rewards": [reward_spec(name) for name in update.rewards],
        "weights": update.reward_weights if weighted else [],
        "aggregation": "sum_then_normalize",
        "responses_per_prompt": config.batch_config.G,
        "trainer_state": checkpoint.trainer_state,
    }


def reference_of(checkpoint: CheckpointToProbe, policy: PolicySpec) -> PolicySpec:
    """The reference policy of the KL term."""
    weights, *base = checkpoint.reference
    return policy.model_copy(update={"weights": weights, "base": "".join(base), "step": None})

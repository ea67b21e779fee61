"""What a configuration asks for as stages take it: code by its content, and nothing that cannot change a result."""

from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from entropy_core.config.schema import ProbeConfig
from entropy_core.files import functions as user_functions
from entropy_core.files.sources import content_digest
from entropy_core.losses import functions as user_losses
from entropy_core.losses import token_weights
from entropy_core.losses.interventions import InterventionSpec, asked_for, changed_spec, is_own
from entropy_core.losses.phase import PhaseSpec
from entropy_core.losses.spec import LossSpec
from entropy_core.numerics.advantages import divided_by
from entropy_core.policy.spec import PolicySpec, ProposalSpec
from entropy_core.rewards import functions as rewards
from entropy_core.rewards.spec import RewardSpec
from entropy_core.sequences.vllm_engine import vllm_version


def digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the digests of the contents of files, by name."""
    return {name: content_digest(path) for name, path in files.items()}


def reward_spec(name: str) -> RewardSpec:
    """Return a reward function with the content of what it runs."""
    file = rewards.source_file(name)
    return RewardSpec(
        name=user_functions.without_folder(name),
        source=content_digest(file) if file else "",
        imports=digests(rewards.imported_files(name)),
        library=rewards.library(name),
    )


def loss_spec(config: ProbeConfig) -> LossSpec:
    """Return the loss; what cannot change its gradient is left at its default, so that equal steps have equal keys."""
    update, file = config.update, user_losses.source_file(config.update.loss)
    spec = LossSpec(
        name=user_functions.without_folder(update.loss),
        source=content_digest(file) if file else "",
        imports=digests(user_functions.imported_files(file)) if file else {},
        scale_rewards=divided_by(update.loss, update.scale_rewards),
        max_new_tokens=config.generation.max_new_tokens,
        kl_beta=update.kl_beta,
        kl_in=update.kl_in if update.kl_beta else "loss",
        use_bias_correction_kl=bool(update.kl_beta) and update.use_bias_correction_kl,
        importance_sampling_level=update.importance_sampling_level,
        top_entropy_quantile=update.top_entropy_quantile,
        entropy_coef=update.entropy_coef,
        epsilon_high=update.epsilon_high,
        multi_objective_aggregation=update.multi_objective_aggregation,
        reward_clip_range=update.reward_clip_range,
        normalize_advantages=update.normalize_advantages,
        mask_truncated_completions=update.mask_truncated_completions,
        off_policy=_bounds(config) if not file else [],
    )
    if not (update.micro_batch and spec.averages_micro_batches):
        return spec
    return spec.model_copy(update={"micro_batch": update.micro_batch, "seed": config.batch_config.U_batch_seed})


def phase_spec(config: ProbeConfig) -> PhaseSpec:
    """Return what a step of the phase is keyed by; the number of epochs is no part of it."""
    phase, seed_of_u = config.update.phase, config.batch_config.U_batch_seed
    seed = seed_of_u if phase.shuffle_seed < 0 else phase.shuffle_seed
    return PhaseSpec(
        minibatches=phase.minibatches,
        shuffle_seed=seed if phase.order == "shuffled" else None,
        epsilon=phase.epsilon,
        epsilon_high=phase.epsilon_high or phase.epsilon,
        delta=phase.delta or None,
        off_policy_mask_threshold=phase.off_policy_mask_threshold or None,
    )


def _bounds(config: ProbeConfig) -> list[float | None]:
    """Those of the phase, for a U whose ratios are to recorded log-probabilities: its first step clips, too."""
    u = config.batch_config.U
    if not (config.update.phase.follow and u.source and u.old_logprobs == "recorded"):
        return []
    return list(astuple(phase_spec(config).off_policy))


def intervention_specs(config: ProbeConfig) -> list[InterventionSpec]:
    """Return the interventions that a configuration asks for, each once."""
    found, run = [], loss_spec(config)
    for entry in config.interventions:
        for name, value in asked_for(entry):
            file = token_weights.source_file(name) if is_own(name) else None
            spec = InterventionSpec(
                name=user_functions.without_folder(name),
                value=value,
                source=content_digest(file) if file else "",
                imports=digests(user_functions.imported_files(file)) if file else {},
                seed=config.batch_config.U_batch_seed,
            )
            if not run.micro_batch and changed_spec(run, spec).averages_micro_batches:
                spec = spec.model_copy(update={"micro_batch": config.update.micro_batch})
            found.append(spec)
    return list({spec.label: spec for spec in found}.values())


def rehearsed_interventions(config: ProbeConfig) -> int:
    """Return how many interventions are rehearsed, at most."""
    asked, count = config.lab.rehearse.interventions, len(intervention_specs(config))
    return 0 if asked == "none" else count if asked == "all" else min(count, int(asked.removeprefix("best ")))


def sampler_of(config: ProbeConfig, policy: PolicySpec) -> tuple[PolicySpec, ProposalSpec | None]:
    """Return the policy that E is sampled with, and the law; None if both are those of the scores."""
    how = config.generation
    if not how.own_sampler:
        return policy, None
    sampler = policy.model_copy(update={"dtype": "bfloat16"}) if how.sampler == "bf16" else policy
    engine = vllm_version(config.execution.vllm_python) if how.sampler == "vllm" else ""
    if not how.proposal_temperature:
        return sampler, ProposalSpec(temperature=how.temperature, share=0.0, engine=engine)
    return sampler, ProposalSpec(temperature=how.proposal_temperature, share=how.proposal_share, engine=engine)

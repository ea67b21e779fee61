"""Rehearse a run from one checkpoint: real steps, each on fresh responses of the policy after the last, and E between.

A chain is the steps under one intervention from one of the seeds. Prompts and draws of U depend on the seed and on the
number of the step, those of E on the seed alone, and neither on the intervention: chains from one seed have common
random numbers.
"""

from collections.abc import Callable, Sequence
from functools import partial

from entropy_core.config.schema import ProbeConfig
from entropy_core.losses.changed import AS_IT_IS
from entropy_core.losses.interventions import InterventionSpec, not_applicable
from entropy_core.pipeline import catalogue as stage
from entropy_core.pipeline.batch_inputs import reference_of, responses_of_e, rewarded, sampled_e, sampled_u
from entropy_core.pipeline.lab import chosen
from entropy_core.pipeline.preflight import CheckpointToProbe
from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.pipeline.specs import intervention_specs, loss_spec
from entropy_core.pipeline.stages_of import StagesOf
from entropy_core.policy.spec import PolicySpec
from entropy_core.store.artifact import Artifact

NOT_REHEARSED = {"drop_costliest": "it selects tokens by sensitivities, which are computed for the first step alone"}
"""Name → why."""

SEEDS_APART = 100_000
"""More than the steps of a rehearsal, so that no two seeds have a batch in common."""


def chains(config: ProbeConfig, tried: Inputs) -> list[InterventionSpec]:
    """Return what is rehearsed: the run as it is, and those interventions that are asked for.

    Args:
        config: says which.
        tried: what `lab.tried` returned; empty without interventions.
    """
    loss = loss_spec(config)
    specs = [
        spec for spec in intervention_specs(config) if spec.name not in NOT_REHEARSED and not not_applicable(loss, spec)
    ]
    if not tried:
        return [AS_IT_IS]
    return chosen(config.lab.rehearse.interventions, [AS_IT_IS, *specs], tried["screen"], tried["predicted"])


class Rehearsal:
    """The stages of a rehearsal on one checkpoint.

    Args:
        config: how many steps, from how many seeds.
        checkpoint: a checkpoint from `preflight`.
        optimizer: artifact of load-checkpoint.
        pools: artifacts of load-prompts, for E and for U.
        policy: the policy of the checkpoint.
        stages: runner of the stages of the checkpoint.
        run: runner of stages, for chains that do not depend on each other.
        release: called with an artifact when no stage will open its vectors any more.
    """

    def __init__(
        self,
        config: ProbeConfig,
        checkpoint: CheckpointToProbe,
        optimizer: Artifact,
        pools: tuple[Artifact, Artifact],
        policy: PolicySpec,
        stages: StagesOf,
        run: Runner,
        release: Callable[[Artifact], None],
    ) -> None:
        self.config, self.checkpoint, self.optimizer, self.policy = config, checkpoint, optimizer, policy
        self.e_pool, self.u_pool = pools
        self.stages, self.run, self.release = stages, run, release
        self.asked, self.loss = config.lab.rehearse, loss_spec(config)

    def of(self, specs: Sequence[InterventionSpec]) -> Inputs:
        """Take the steps of every chain.

        Args:
            specs: first the run as it is, then the interventions.

        Returns:
            The inputs of the rehearsal stage that are its own.
        """
        seeds = range(self.asked.seeds)
        starts = [self._on_e(self.policy, replicate, f" · rehearsal {replicate + 1}") for replicate in seeds]
        found = self.run.together(
            partial(self._chain, spec, replicate, starts[replicate]) for spec in specs for replicate in seeds
        )
        return {"policies": [entry for chain in found for entry in chain]}

    def _chain(self, spec: InterventionSpec, replicate: int, start: Inputs) -> list[Inputs]:
        """Measure E at the checkpoint, after every so many steps, and after the last."""
        named = {"intervention": spec.label, "replicate": replicate + 1}
        policy, measured = self.policy, [named | {"number": 0} | start]
        for number in range(1, self.asked.steps + 1):
            label = f" · {spec.label} · rehearsal {replicate + 1}, step {number}/{self.asked.steps}"
            step = self._step(policy, spec, replicate, number, label)
            before, policy = policy.step, policy.model_copy(update={"step": step})
            if number % self.asked.every == 0 or number == self.asked.steps:
                measured.append(named | {"number": number} | self._on_e(policy, replicate, label))
            if before is not None:
                self.release(before)
        assert policy.step is not None
        self.release(policy.step)
        return measured

    def _step(self, policy: PolicySpec, spec: InterventionSpec, replicate: int, number: int, label: str) -> Artifact:
        """Sample U from the policy as it is now, reward it, and take the step on it."""
        batch, update = self.config.batch_config, self.config.update
        seed = batch.U_batch_seed + SEEDS_APART * replicate + number - 1
        drawn = sampled_u(self.config, policy, self.u_pool, seed)
        sequences = self.stages.sample(stage.SAMPLE_U, batch.B_U * batch.G, drawn, label)
        of_u = rewarded(self.config, self.checkpoint, sequences, self.u_pool)
        aggregation = {"aggregation": update.multi_objective_aggregation}
        by_discriminator = spec.name == "clip_discriminator"
        of_policy = {"policy": policy, "sequences": sequences}
        inputs = of_policy | {
            "checkpoint": self.optimizer,
            "rewards": self.stages.once(stage.REWARD_U, of_u | aggregation, label),
            "scores": self.stages.score(stage.SCORE_U, policy, sequences, label),
            "reference": [],
            "discriminators": self.stages.once(stage.DISCRIMINATE_U, of_policy, label) if by_discriminator else None,
            "loss": self.loss.model_copy(update={"seed": seed}) if self.loss.micro_batch else self.loss,
            "intervention": spec if spec is AS_IT_IS else spec.model_copy(update={"seed": seed}),
            "responses_per_prompt": batch.G,
            "max_grad_norm": update.max_grad_norm,
            "rate": self.checkpoint.rehearsed_rates[number - 1],
        }
        if update.kl_beta:
            of_reference = reference_of(self.checkpoint, policy)
            inputs["reference"] = self.stages.score(stage.SCORE_REFERENCE, of_reference, sequences, label)
        return self.stages.once(stage.REHEARSAL_STEP, inputs, label)

    def _on_e(self, policy: PolicySpec, replicate: int, label: str) -> Inputs:
        """Sample E from a policy, score it, and reward it."""
        drawn = sampled_e(
            self.config, policy, self.e_pool, self.config.batch_config.E_batch_seed + SEEDS_APART * replicate
        )
        sequences = self.stages.sample(stage.SAMPLE_E, responses_of_e(self.config)[0], drawn, label)
        of_e = [rewarded(self.config, self.checkpoint, [shard], self.e_pool) for shard in sequences]
        scores = self.stages.score(stage.SCORE_E, policy, sequences, label)
        return {"scores": scores, "rewards": self.stages.over_shards(stage.REWARD_E, of_e, label)}

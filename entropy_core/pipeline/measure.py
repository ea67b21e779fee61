"""Run the stages that need the policy of one checkpoint, in order, and return the inputs of the variance stage.

E is the evaluation batch and U the update batch.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from entropy_core.config.schema import ProbeConfig
from entropy_core.pipeline import catalogue as stage
from entropy_core.pipeline.batch_inputs import reference_of, responses_of_e, rewarded, sampled_e, sampled_u
from entropy_core.pipeline.lab import Batches, StepAsItIs, tried
from entropy_core.pipeline.named_base import base_differences
from entropy_core.pipeline.phase import OnE, followed
from entropy_core.pipeline.preflight import CheckpointToProbe
from entropy_core.pipeline.recorded_u import RecordedU, remarks
from entropy_core.pipeline.rehearsed import Rehearsal, chains
from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.pipeline.specs import loss_spec, sampler_of
from entropy_core.pipeline.stages_of import StagesOf
from entropy_core.policy.spec import PolicySpec
from entropy_core.store.artifact import Artifact

NOISE_DRAWS, NOISE_SEQUENCES = 4, 1024
"""Draws and sequences of the rounding noise: enough to estimate its size, and cheaper than one step size."""
CALIBRATION_SEQUENCES = 64
"""Number of sequences on which derivatives are compared with forward mode in full precision."""
DROPOUT_DRAWS = 4
"""Steps with dropout on: enough to see how far they are from the step without."""


def keep(artifact: Artifact) -> None:
    """Keep the vectors of an artifact; the default of `release`."""


class Measurement:
    """The stages of one checkpoint that need its policy.

    Args:
        config: configuration of the sweep.
        checkpoint: a checkpoint from `preflight`.
        optimizer: artifact of load-checkpoint.
        pools: artifacts of load-prompts, by split.
        run: runner of stages.
        release: called with an artifact when no stage will open its vectors any more.
    """

    def __init__(
        self,
        config: ProbeConfig,
        checkpoint: CheckpointToProbe,
        optimizer: Artifact,
        pools: Mapping[str, Artifact],
        run: Runner,
        release: Callable[[Artifact], None] = keep,
    ) -> None:
        self.config, self.checkpoint, self.optimizer = config, checkpoint, optimizer
        self.run, self.release = run, release
        self.stages = StagesOf(checkpoint.name, config, run)
        self.asked_for: dict[str, Inputs] = {}  # see `final_stages.ASKED_FOR`
        self.recorded: list[Artifact] = []  # U as its trainer recorded it, where it is not sampled
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.with_dropout: Artifact | None = None  # of dropout-u; it is no input of the statistics
        self.on_bases: tuple[list[Artifact], list[Artifact]] | None = None  # of U, on the given base and the named one
        self.e_pool, self.u_pool = (pools[split] for split in config.splits)
        self.policy = PolicySpec(
            weights=checkpoint.weights or self._weights(),
            base=checkpoint.base,
            dtype=config.policy.dtype,
            attn_implementation=config.policy.attn_implementation,
            temperature=config.generation.temperature,
        )
        self.e_total, self.together = responses_of_e(config)

    def _weights(self) -> Artifact:
        """Put weights that lie in shards into files that transformers can open."""
        inputs = {"checkpoint": self.checkpoint.digest, "description": self.checkpoint.description}
        return self.stages.once(stage.LOAD_WEIGHTS, inputs)

    def variance_inputs(self) -> Inputs:
        """Run the stages and return all inputs of the variance stage except its settings."""
        batch, policy = self.config.batch_config, self.policy
        of_e = partial(self._sample_e, batch.E_batch_seed, "")
        (e_batch, scores), (u_batch, scores_u, update) = self.run.both(of_e, self._step)
        calibration = self._calibration(e_batch, update)
        half_width = calibration.summary["half_width"] if calibration else 0.0  # ε of central differences; 0: none

        def along_v(batches: Sequence[Artifact], suffix: str = "") -> list[Artifact]:
            shared = {"policy": policy, "update": update, "half_width": half_width}
            shared |= {"arithmetic": self.config.policy.arithmetic}
            return self.stages.over_shards(stage.FIRST_ORDER_E, [shared | {"sequences": b} for b in batches], suffix)

        whole = {"policy": policy, "sequences": e_batch, "scores": scores, "responses_per_prompt": self.together}
        first_order_e, gradient = self.run.both(
            partial(along_v, e_batch), partial(self.stages.once, stage.ENTROPY_GRADIENT, whole)
        )
        if self.config.price:
            reward_inputs = [self._rewarded([shard], self.e_pool) for shard in e_batch]
            self.asked_for["price"] = {"rewards": self.stages.over_shards(stage.REWARD_E, reward_inputs)}
        of_both = {
            "policy": policy,
            "sequences": u_batch,
            "checkpoint": self.optimizer,
            "update": update,
            "gradient": gradient,
        }
        reward_gradient = self._price_of_tokens(e_batch, scores, of_both) if self.config.price else None
        along_u = [partial(self.stages.once, what, of_both) for what in (stage.FIRST_ORDER_U, stage.HALF_STEPS_U)]
        first_order_u, half_steps_u = self.run.together(along_u)
        if self.checkpoint.after:
            self.asked_for["post_mortem"] = self._dissected(e_batch, update, gradient)
        discriminators_u = self.stages.once(stage.DISCRIMINATE_U, {"policy": policy, "sequences": u_batch})
        if self.checkpoint.dropout:
            self.with_dropout = self.stages.once(stage.DROPOUT_U, of_both | {"draws": DROPOUT_DRAWS})
        learning_rate = self.optimizer.summary["learning_rate"]
        if self.config.interventions:
            batches = Batches(e_batch, scores, u_batch, scores_u, discriminators_u, self.together)
            loss = loss_spec(self.config)
            step = StepAsItIs(
                policy, self.optimizer, update, gradient, first_order_u, learning_rate, loss, reward_gradient
            )
            self.asked_for["interventions"] = tried(self.config, batches, step, self.stages, self.release)
        else:
            self.release(gradient)
            if reward_gradient:
                self.release(reward_gradient)
        moved = self._moved(e_batch, scores, update, learning_rate)
        replicates = []
        for i in range(1, batch.E_replicates):
            seed, suffix = batch.E_batch_seed + i, f" · replicate {i + 1}/{batch.E_replicates}"
            e_again, scores_again = self._sample_e(seed, suffix)
            replicates.append({"seed": seed, "scores": scores_again, "first_order_e": along_v(e_again, suffix)})
        rescores = self._rescored(e_batch)
        self.release(update)
        of_rollout = {"policy": policy, "checkpoint": self.optimizer, "sequences": u_batch, "update": update}
        on_e = OnE(e_batch, scores, learning_rate, self.config.importance.estimators[0], self.config.policy.arithmetic)
        self.asked_for["phase"] = followed(
            self.config, of_rollout, on_e, self.checkpoint.learning_rates, self.stages, self.release
        )
        if self.config.lab.rehearse.steps:
            self._rehearse()
        if isinstance(policy.weights, Artifact):
            self.release(policy.weights)
        return {
            "learning_rate": learning_rate,
            "max_new_tokens": self.config.generation.max_new_tokens,
            "seed": batch.E_batch_seed,
            "scores": scores,
            "rescores": rescores,
            "first_order_e": first_order_e,
            "first_order_u": first_order_u,
            "half_steps_u": half_steps_u,
            "update": update,
            "scores_u": scores_u,
            "discriminators_u": discriminators_u,
            "calibration": calibration,
            "moved": moved,
            "replicates": replicates,
            "estimators": self.config.importance.estimators,
        }

    def _rehearse(self) -> None:
        """Take the steps of the run as it is and of the best interventions, each on fresh responses."""
        pools = (self.e_pool, self.u_pool)
        rehearsal = Rehearsal(
            self.config, self.checkpoint, self.optimizer, pools, self.policy, self.stages, self.run, self.release
        )
        self.asked_for["rehearsal"] = rehearsal.of(chains(self.config, self.asked_for.get("interventions", {})))

    def _step(self) -> tuple[list[Artifact], list[Artifact], Artifact]:
        """Sample and score a U batch, and take the step."""
        u_batch = self._sample_u()
        scores_u = self.stages.score(stage.SCORE_U, self.policy, u_batch)
        if self.checkpoint.named_base:
            on_named = self.policy.model_copy(update={"base": self.checkpoint.named_base})
            self.on_bases = scores_u, self.stages.score(stage.SCORE_REFERENCE, on_named, u_batch)
        return u_batch, scores_u, self._update(u_batch, scores_u)

    def said_of_bases(self) -> str:
        """Return how far the log-probabilities of U differ between the given base and the adapter's own; or empty."""
        # an artifact without a digest is one that `plan` only promises: there is nothing to compare yet
        if not self.on_bases or not all(shard.digest for shards in self.on_bases for shard in shards):
            return ""
        adapter, given = (self.checkpoint.paths[digest] for digest in (self.checkpoint.weights, self.checkpoint.base))
        return base_differences(adapter, given.name, *self.on_bases)

    def _dissected(self, e_batch: Sequence[Artifact], update: Artifact, gradient: Artifact) -> Inputs:
        """Split the step that the trainer took, and measure what it did on E."""
        after = self.policy.model_copy(update={"weights": self.checkpoint.after})
        of_step = {"policy": self.policy, "checkpoint": self.optimizer, "update": update, "gradient": gradient}
        real = self.stages.once(stage.REAL_STEP, of_step | {"after": after})
        moved = {"policy": self.policy, "update": real, "eta": self.optimizer.summary["learning_rate"]}
        along = [moved | {"sequences": sequences} for sequences in e_batch]
        shards = self.stages.over_shards(stage.IMPORTANCE, along, " · the step that was taken")
        self.release(real)
        batch = self.config.batch_config
        of_u = {"recorded": self.recorded[0], "old_logprobs": batch.U.old_logprobs, "prompts": batch.B_U}
        return of_u | {"real": real, "moved": shards}

    def _price_of_tokens(
        self, e_batch: Sequence[Artifact], scores: Sequence[Artifact], of_both: Inputs
    ) -> Artifact | None:
        """Compute ∇J and the share of each token of U in δJ₁; None if a response of E has no reward (`open`)."""
        price = self.asked_for["price"]
        rewards, price["shares"] = price["rewards"], None
        if any(shard.summary.get("open") for shard in rewards):
            return None
        of_e = {"policy": self.policy, "sequences": e_batch, "scores": scores, "rewards": rewards}
        gradient = self.stages.once(stage.REWARD_GRADIENT, of_e | {"responses_per_prompt": self.together})
        price["shares"] = self.stages.once(stage.REWARD_SHARES_U, of_both | {"gradient": gradient})
        return gradient

    def _sample_e(self, seed: int, suffix: str) -> tuple[list[Artifact], list[Artifact]]:
        """Sample an E batch and score it."""
        policy, proposal = sampler_of(self.config, self.policy)
        inputs = sampled_e(self.config, policy, self.e_pool, seed) | {"proposal": proposal}
        e_batch = self.stages.sample(stage.SAMPLE_E, self.e_total, inputs, suffix)
        return e_batch, self.stages.score(stage.SCORE_E, self.policy, e_batch, suffix)

    def _sample_u(self) -> list[Artifact]:
        batch = self.config.batch_config
        if self.checkpoint.recorded:
            self.recorded = [self.stages.once(stage.RECORDED_U, self._as_recorded(self.checkpoint.recorded))]
            return self.recorded
        inputs = sampled_u(self.config, self.policy, self.u_pool, batch.U_batch_seed)
        return self.stages.sample(stage.SAMPLE_U, batch.B_U * batch.G, inputs)

    def _as_recorded(self, rollouts: RecordedU) -> Inputs:
        inputs = {"policy": self.policy, "prompts": self.u_pool, "sources": list(rollouts.files)}
        return inputs | {"number": rollouts.number, "max_new_tokens": self.config.generation.max_new_tokens}

    def _first(self, e_batch: Sequence[Artifact], sequences: int) -> Inputs:
        """Return the policy, the shards that contain the first sequences of E, and the number of these sequences."""
        shards = e_batch[: -(-sequences // self.config.execution.shard_size)]
        return {"policy": self.policy, "sequences": shards, "count": min(sequences, self.e_total)}

    def _rescored(self, e_batch: Sequence[Artifact]) -> list[Artifact]:
        first = self._first(e_batch, NOISE_SEQUENCES)
        suffixes = [f" · draw {d}/{NOISE_DRAWS}" for d in range(1, NOISE_DRAWS + 1)]
        return self.stages.each(stage.RESCORE_E, [first | {"draw": d} for d in range(NOISE_DRAWS)], suffixes)

    def _calibration(self, e_batch: Sequence[Artifact], update: Artifact) -> Artifact | None:
        """Measure the error of the derivatives over E, and choose ε; None if they are exact (forward mode in full)."""
        how = self.config.policy
        if how.derivative == "forward_mode" and how.arithmetic == "full":
            return None
        first = self._first(e_batch, CALIBRATION_SEQUENCES)
        return self.stages.once(stage.CALIBRATE, first | {"update": update, "arithmetic": how.arithmetic})

    def _rewarded(self, sequences: Sequence[Artifact], pool: Artifact) -> Inputs:
        return rewarded(self.config, self.checkpoint, sequences, pool)

    def _update(self, u_batch: Sequence[Artifact], scores_u: Sequence[Artifact]) -> Artifact:
        update, reference, rollouts = self.config.update, [], self.checkpoint.recorded
        loss = loss_spec(self.config)
        if rollouts and rollouts.rewarded(self.config):
            [rewards] = self.recorded
        else:
            reward_inputs = self._rewarded(u_batch, self.u_pool) | {"aggregation": update.multi_objective_aggregation}
            rewards = self.stages.once(stage.REWARD_U, reward_inputs)
        if update.kl_beta and not (rollouts and rollouts.referenced(self.config)):
            of_reference = reference_of(self.checkpoint, self.policy)
            reference = self.stages.score(stage.SCORE_REFERENCE, of_reference, u_batch)
        inputs = {
            "policy": self.policy,
            "checkpoint": self.optimizer,
            "sequences": u_batch,
            "rewards": rewards,
            "scores": scores_u,
            "reference": reference,
            "recorded": self.recorded,
            "old_logprobs": self.config.batch_config.U.old_logprobs if self.recorded else "scored",
            "loss": loss,
            "responses_per_prompt": self.config.batch_config.G,
            "max_grad_norm": update.max_grad_norm,
        }
        step = self.stages.once(stage.COMPUTE_UPDATE, inputs)
        if rollouts:
            how = self.config.batch_config.U.old_logprobs
            self.notes, self.warnings = remarks(rollouts, self.recorded[0].summary, step.summary, how, loss.micro_batch)
        return step

    def _moved(
        self, e_batch: Sequence[Artifact], scores: Sequence[Artifact], update: Artifact, learning_rate: float
    ) -> list[Inputs]:
        """Measure E at every step size: one entry each; at 0, where nothing changes, its lists are empty."""
        asked = self.config.importance
        in_lr = asked.eta_unit == "learning_rate"
        unit = learning_rate if in_lr else 1.0
        by_difference, by_path = set(asked.estimators) - {"path_integral"}, "path_integral" in asked.estimators
        arithmetic = self.config.policy.arithmetic

        def at(multiple: float) -> Inputs:
            eta, suffix = multiple * unit, f" · η={multiple:g}{' lr' if in_lr else ''}"
            shards: list[Inputs] = []
            along: list[Inputs] = []
            if eta:
                shared = {"policy": self.policy, "update": update, "eta": eta}
                shards = [shared | {"sequences": sequences} for sequences in e_batch]
                pairs = zip(shards, scores, strict=True)
                along = [shard | {"scores": score, "arithmetic": arithmetic} for shard, score in pairs]
            return {
                "eta": eta,
                "eta_over_lr": multiple if in_lr else eta / learning_rate,
                "shards": self.stages.over_shards(stage.IMPORTANCE, shards, suffix) if by_difference else [],
                "path": self.stages.over_shards(stage.PATH_INTEGRAL, along, suffix) if by_path else [],
            }

        return self.run.together(partial(at, multiple) for multiple in asked.etas)

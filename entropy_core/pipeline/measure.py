"""Run the stages that need the policy of one checkpoint, in order, and return the inputs of the variance stage.

E is the evaluation batch and U the update batch.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from entropy_core.config.schema import ProbeConfig
from entropy_core.files import functions as user_functions
from entropy_core.files.sources import content_digest
from entropy_core.losses import functions as user_losses
from entropy_core.losses.spec import LossSpec
from entropy_core.numerics.advantages import divided_by
from entropy_core.pipeline import catalogue as stage
from entropy_core.pipeline.lab import Batches, StepAsItIs, tried
from entropy_core.pipeline.named_base import base_differences
from entropy_core.pipeline.phase import OnE, followed
from entropy_core.pipeline.preflight import CheckpointToProbe, encoding
from entropy_core.pipeline.recorded_u import RecordedU, remarks
from entropy_core.pipeline.runner import Inputs, Runner
from entropy_core.policy.spec import PolicySpec, ProposalSpec
from entropy_core.prompts import pools as prompts
from entropy_core.rewards import functions as rewards
from entropy_core.rewards.spec import RewardSpec
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage

NOISE_DRAWS, NOISE_SEQUENCES = 4, 1024
"""Draws and sequences of the rounding noise: enough to estimate its size, and cheaper than one step size."""
CALIBRATION_SEQUENCES = 64
"""Number of sequences on which central differences are compared with forward mode."""
DROPOUT_DRAWS = 4
"""Steps with dropout on: enough to see how far they are from the step without."""


def source_of(config: ProbeConfig) -> Path | None:
    """Return the file or folder of the prompts; None for a generated pool."""
    batch = config.batch_config
    return prompts.locate(batch.dataset_name, batch.dataset_path, batch.allow_download)


def load_pool(config: ProbeConfig, split: str, tokenizer: str, run: Runner) -> Artifact:
    """Load the prompts of a split.

    Args:
        config: configuration with the dataset.
        split: name of the split.
        tokenizer: digest of the tokenizer's files.
        run: runner of stages.

    Returns:
        Artifact of load-prompts.
    """
    batch, source = config.batch_config, source_of(config)
    inputs = {
        "dataset_name": "" if prompts.is_path(batch.dataset_name) else batch.dataset_name,
        "options": batch.dataset_options,
        "configuration": batch.dataset_config,
        "split": split,
        "prompt_column": batch.prompt_column,
        "source": content_digest(source) if source else "",  # keyed by content, not by path
        "revision": prompts.revision(source) if source else "",
        "library": prompts.library(batch.dataset_name),
        "tokenizer": tokenizer,
        "encoding": encoding(config),
    }
    return run(stage.LOAD_PROMPTS, inputs, f"{Path(batch.dataset_name).name} {split}")


def load_checkpoint(config: ProbeConfig, checkpoint: CheckpointToProbe, run: Runner) -> Artifact:
    """Load and check the optimizer state of a checkpoint.

    Args:
        config: configuration, which may set another learning rate or a fresh optimizer.
        checkpoint: a checkpoint from `preflight`.
        run: runner of stages.

    Returns:
        Artifact of load-checkpoint.
    """
    inputs = {
        "checkpoint": checkpoint.digest,
        "base": checkpoint.base or checkpoint.description,
        "learning_rate": config.update.learning_rate,
        "optimizer_state": config.update.optimizer_state,
        "weights": config.policy.weights,
    }
    return run(stage.LOAD_CHECKPOINT, inputs, checkpoint.name)


def keep(artifact: Artifact) -> None:
    """Keep the vectors of an artifact; the default of `release`."""


def _reward(name: str) -> RewardSpec:
    file = rewards.source_file(name)
    return RewardSpec(
        name=user_functions.without_folder(name),
        source=content_digest(file) if file else "",
        imports=_digests(rewards.imported_files(name)),
        library=rewards.library(name),
    )


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: content_digest(path) for name, path in files.items()}


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
        self.price: Inputs = {}  # of the price stage, once E has its rewards
        self.interventions: Inputs = {}  # of the interventions stage, once they have been tried
        self.phase: Inputs = {}  # of the phase stage, once its steps have been followed
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
        batch = config.batch_config
        self.replacement = batch.E_sampling_mode == "replacement"
        self.together = (
            1 if self.replacement else batch.G
        )  # responses of E to the same prompt, which are not independent
        self.e_total = batch.E_total_sequences if self.replacement else batch.B_E_values[0] * batch.G

    def _weights(self) -> Artifact:
        """Put weights that lie in shards into files that transformers can open."""
        inputs = {"checkpoint": self.checkpoint.digest, "description": self.checkpoint.description}
        return self._once(stage.LOAD_WEIGHTS, inputs)

    def variance_inputs(self) -> Inputs:
        """Run the stages and return all inputs of the variance stage except its settings."""
        batch, policy = self.config.batch_config, self.policy
        of_e = partial(self._sample_e, batch.E_batch_seed, "")
        (e_batch, scores), (u_batch, scores_u, update) = self.run.both(of_e, self._step)
        calibration = self._calibration(e_batch, update)
        half_width = calibration.summary["half_width"] if calibration else 0.0

        def along_v(batches: Sequence[Artifact], suffix: str = "") -> list[Artifact]:
            shared = {"policy": policy, "update": update, "half_width": half_width}
            return self._over_shards(stage.FIRST_ORDER_E, [shared | {"sequences": b} for b in batches], suffix)

        whole = {"policy": policy, "sequences": e_batch, "scores": scores, "responses_per_prompt": self.together}
        first_order_e, gradient = self.run.both(
            partial(along_v, e_batch), partial(self._once, stage.ENTROPY_GRADIENT, whole)
        )
        if self.config.price:
            rewarded = [self._rewarded([shard], self.e_pool) for shard in e_batch]
            self.price = {"rewards": self._over_shards(stage.REWARD_E, rewarded)}
        of_both = {
            "policy": policy,
            "sequences": u_batch,
            "checkpoint": self.optimizer,
            "update": update,
            "gradient": gradient,
        }
        along_u = [partial(self._once, what, of_both) for what in (stage.FIRST_ORDER_U, stage.HALF_STEPS_U)]
        first_order_u, half_steps_u = self.run.together(along_u)
        discriminators_u = self._once(stage.DISCRIMINATE_U, {"policy": policy, "sequences": u_batch})
        if self.checkpoint.dropout:
            self.with_dropout = self._once(stage.DROPOUT_U, of_both | {"draws": DROPOUT_DRAWS})
        learning_rate = self.optimizer.summary["learning_rate"]
        if self.config.interventions:
            batches = Batches(e_batch, scores, u_batch, scores_u, discriminators_u, self.together)
            step = StepAsItIs(policy, self.optimizer, update, gradient, learning_rate, self._loss())
            self.interventions = tried(self.config, batches, step, self.run, self.checkpoint.name, self.release)
        else:
            self.release(gradient)
        moved = self._moved(e_batch, update, learning_rate)
        replicates = []
        for i in range(1, batch.E_replicates):
            seed, suffix = batch.E_batch_seed + i, f" · replicate {i + 1}/{batch.E_replicates}"
            e_again, scores_again = self._sample_e(seed, suffix)
            replicates.append({"seed": seed, "scores": scores_again, "first_order_e": along_v(e_again, suffix)})
        rescores = self._rescored(e_batch)
        self.release(update)
        of_rollout = {"policy": policy, "checkpoint": self.optimizer, "sequences": u_batch, "update": update}
        on_e = OnE(e_batch, learning_rate, self.config.importance.estimators[0])
        self.phase = followed(self.config, of_rollout, on_e, self.run, self.checkpoint.name, self.release)
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

    def _step(self) -> tuple[list[Artifact], list[Artifact], Artifact]:
        """Sample and score a U batch, and take the step."""
        u_batch = self._sample_u()
        scores_u = self._score(stage.SCORE_U, self.policy, u_batch)
        if self.checkpoint.named_base:
            on_named = self.policy.model_copy(update={"base": self.checkpoint.named_base})
            self.on_bases = scores_u, self._score(stage.SCORE_REFERENCE, on_named, u_batch)
        return u_batch, scores_u, self._update(u_batch, scores_u)

    def said_of_bases(self) -> str:
        """Say what another base than the one that the adapter names makes of U; empty if it has no other."""
        if not self.on_bases or not all(shard.digest for shards in self.on_bases for shard in shards):
            return ""
        adapter, given = (self.checkpoint.paths[digest] for digest in (self.checkpoint.weights, self.checkpoint.base))
        return base_differences(adapter, given.name, *self.on_bases)

    def _once(self, what: Stage, inputs: Inputs, suffix: str = "") -> Artifact:
        return self.run(what, inputs, self.checkpoint.name + suffix)

    def _over_shards(self, what: Stage, inputs: Sequence[Inputs], suffix: str = "") -> list[Artifact]:
        labels = [f"{self.checkpoint.name}{suffix} · shard {i}/{len(inputs)}" for i in range(1, len(inputs) + 1)]
        return self.run.map(what, inputs, labels)

    def _sample(self, what: Stage, total: int, inputs: Inputs, suffix: str = "") -> list[Artifact]:
        size = self.config.execution.shard_size
        shared = inputs | {
            "max_new_tokens": self.config.generation.max_new_tokens,
            "stop_strings": self.config.generation.stop_strings,
        }
        parts = [{"first": first, "count": min(size, total - first)} for first in range(0, total, size)]
        return self._over_shards(what, [shared | part for part in parts], suffix)

    def _sample_e(self, seed: int, suffix: str) -> tuple[list[Artifact], list[Artifact]]:
        """Sample an E batch and score it."""
        policy, proposal = self._sampler()
        inputs = {
            "policy": policy,
            "proposal": proposal,
            "prompts": self.e_pool,
            "batch": "E",
            "mode": self.config.batch_config.E_sampling_mode,
            "responses_per_prompt": self.together,
            "seed": seed,
        }
        e_batch = self._sample(stage.SAMPLE_E, self.e_total, inputs, suffix)
        return e_batch, self._score(stage.SCORE_E, self.policy, e_batch, suffix)

    def _sampler(self) -> tuple[PolicySpec, ProposalSpec | None]:
        """Return the policy that E is sampled with, and the law; None if both are those of the scores."""
        how = self.config.generation
        if not how.own_sampler:
            return self.policy, None
        policy = self.policy.model_copy(update={"dtype": "bfloat16"}) if how.sampler == "bf16" else self.policy
        if not how.proposal_temperature:
            return policy, ProposalSpec(temperature=how.temperature, share=0.0)
        return policy, ProposalSpec(temperature=how.proposal_temperature, share=how.proposal_share)

    def _sample_u(self) -> list[Artifact]:
        batch = self.config.batch_config
        if self.checkpoint.recorded:
            self.recorded = [self._once(stage.RECORDED_U, self._as_recorded(self.checkpoint.recorded))]
            return self.recorded
        inputs = {
            "policy": self.policy,
            "proposal": None,
            "prompts": self.u_pool,
            "batch": "U",
            "mode": "distinct",
            "responses_per_prompt": batch.G,
            "seed": batch.U_batch_seed,
        }
        return self._sample(stage.SAMPLE_U, batch.B_U * batch.G, inputs)

    def _as_recorded(self, rollouts: RecordedU) -> Inputs:
        inputs = {"policy": self.policy, "prompts": self.u_pool, "sources": list(rollouts.files)}
        return inputs | {"number": rollouts.number, "max_new_tokens": self.config.generation.max_new_tokens}

    def _score(self, what: Stage, policy: PolicySpec, batches: Sequence[Artifact], suffix: str = "") -> list[Artifact]:
        return self._over_shards(what, [{"policy": policy, "sequences": sequences} for sequences in batches], suffix)

    def _first(self, e_batch: Sequence[Artifact], sequences: int) -> Inputs:
        """Return the shards with the first sequences of E, and the number of these sequences."""
        shards = e_batch[: -(-sequences // self.config.execution.shard_size)]
        return {"policy": self.policy, "sequences": shards, "count": min(sequences, self.e_total)}

    def _rescored(self, e_batch: Sequence[Artifact]) -> list[Artifact]:
        first = self._first(e_batch, NOISE_SEQUENCES)
        labels = [f"{self.checkpoint.name} · draw {d}/{NOISE_DRAWS}" for d in range(1, NOISE_DRAWS + 1)]
        return self.run.map(stage.RESCORE_E, [first | {"draw": d} for d in range(NOISE_DRAWS)], labels)

    def _calibration(self, e_batch: Sequence[Artifact], update: Artifact) -> Artifact | None:
        if self.config.policy.derivative == "forward_mode":
            return None
        return self._once(stage.CALIBRATE, self._first(e_batch, CALIBRATION_SEQUENCES) | {"update": update})

    def _rewarded(self, sequences: Sequence[Artifact], pool: Artifact) -> Inputs:
        """The inputs of the rewards of some sequences, which are summed with their weights."""
        update = self.config.update
        weighted = update.reward_weights and set(update.reward_weights) != {1.0}
        return {
            "sequences": sequences,
            "prompts": pool,
            "rewards": [_reward(name) for name in update.rewards],
            "weights": update.reward_weights if weighted else [],
            "aggregation": "sum_then_normalize",
            "responses_per_prompt": self.config.batch_config.G,
            "trainer_state": self.checkpoint.trainer_state,
        }

    def _update(self, u_batch: Sequence[Artifact], scores_u: Sequence[Artifact]) -> Artifact:
        update, reference, rollouts = self.config.update, [], self.checkpoint.recorded
        if rollouts and rollouts.rewarded(self.config):
            [rewards] = self.recorded
        else:
            rewarded = self._rewarded(u_batch, self.u_pool) | {"aggregation": update.multi_objective_aggregation}
            rewards = self._once(stage.REWARD_U, rewarded)
        if update.kl_beta and not (rollouts and rollouts.referenced(self.config)):
            weights, *base = self.checkpoint.reference
            of_reference = self.policy.model_copy(update={"weights": weights, "base": "".join(base)})
            reference = self._score(stage.SCORE_REFERENCE, of_reference, u_batch)
        inputs = {
            "policy": self.policy,
            "checkpoint": self.optimizer,
            "sequences": u_batch,
            "rewards": rewards,
            "scores": scores_u,
            "reference": reference,
            "recorded": self.recorded,
            "old_logprobs": self.config.batch_config.U.old_logprobs if self.recorded else "scored",
            "loss": self._loss(),
            "responses_per_prompt": self.config.batch_config.G,
            "max_grad_norm": update.max_grad_norm,
        }
        step = self._once(stage.COMPUTE_UPDATE, inputs)
        if rollouts:
            how = self.config.batch_config.U.old_logprobs
            self.notes, self.warnings = remarks(rollouts, self.recorded[0].summary, step.summary, how)
        return step

    def _loss(self) -> LossSpec:
        """The loss; what cannot change its gradient is left at its default, so that equal steps have equal keys."""
        update, file = self.config.update, user_losses.source_file(self.config.update.loss)
        in_parts = bool(file) or update.loss == "bnpo" or update.entropy_coef or update.top_entropy_quantile < 1
        return LossSpec(
            name=user_functions.without_folder(update.loss),
            source=content_digest(file) if file else "",
            imports=_digests(user_functions.imported_files(file)) if file else {},
            scale_rewards=divided_by(update.loss, update.scale_rewards),
            max_new_tokens=self.config.generation.max_new_tokens,
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
            micro_batch=update.micro_batch if in_parts else 0,
            seed=self.config.batch_config.U_batch_seed if in_parts and update.micro_batch else 0,
        )

    def _moved(self, e_batch: Sequence[Artifact], update: Artifact, learning_rate: float) -> list[Inputs]:
        """Run the passes at every step size except 0, at which nothing changes."""
        asked = self.config.importance
        unit = learning_rate if asked.eta_unit == "learning_rate" else 1.0
        passes = {
            "shards": stage.IMPORTANCE if set(asked.estimators) - {"path_integral"} else None,
            "path": stage.PATH_INTEGRAL if "path_integral" in asked.estimators else None,
        }

        def at(multiple: float) -> Inputs:
            eta, step = multiple * unit, f" · η={multiple:g}{' lr' if asked.eta_unit == 'learning_rate' else ''}"
            shared = {"policy": self.policy, "update": update, "eta": eta}
            there = [shared | {"sequences": sequences} for sequences in e_batch]
            found = {
                name: self._over_shards(what, there, step) if what and eta else [] for name, what in passes.items()
            }
            in_learning_rates = multiple if asked.eta_unit == "learning_rate" else eta / learning_rate
            return {"eta": eta, "eta_over_lr": in_learning_rates, **found}

        return self.run.together(partial(at, multiple) for multiple in asked.etas)

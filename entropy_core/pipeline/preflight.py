"""Check a sweep before any expensive work starts."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from entropy_core.checkpoints.content import read_json
from entropy_core.checkpoints.schedule import TRAINER_STATE, UnknownScheduleError, factors_to_come
from entropy_core.checkpoints.trainer_files import TrainerFiles
from entropy_core.config.schema import ExecutionConfig, ProbeConfig
from entropy_core.errors import ConfigError
from entropy_core.files.checkpoint import optimizer_digest, weights_digest
from entropy_core.files.digests import file_digest
from entropy_core.files.sources import require_unwritten
from entropy_core.numerics.rules import RULES
from entropy_core.pipeline.dissection import weights_after
from entropy_core.pipeline.named_base import comparable_base
from entropy_core.pipeline.prompts_and_rewards import check_positions, checked_pools, encoded_pools
from entropy_core.pipeline.recorded_u import RecordedU, check_recorded, recorded_of_each, with_sizes
from entropy_core.pipeline.reference import reference_of
from entropy_core.pipeline.settings import Setting, Settled, check_weights, settle, with_read
from entropy_core.pipeline.specs import rehearsed_interventions
from entropy_core.pipeline.trainer_log import trainer_log
from entropy_core.pipeline.usable import UsableCheckpoint, usable_checkpoints
from entropy_core.prompts.pools import Pool
from entropy_core.sequences.vllm_engine import vllm_version

log = logging.getLogger("entropy_probe.preflight")


@dataclass(frozen=True)
class CheckpointToProbe:
    """A checkpoint that can be probed.

    Args:
        directory: directory of the checkpoint.
        name: name of the directory, unique in the sweep.
        step: the trainer's global step.
        digest: digest of all files that a result depends on.
        weights: digest of the files that the policy depends on; empty where the weights are in shards.
        description: digest of the model's configuration and tokenizer, where the weights are in shards; else empty.
        base: digest of an adapter's base model; empty for a full model.
        reference: digests of the weights and of the base of the KL term's reference policy; empty without a KL term.
        tokenizer: digest of the tokenizer's files.
        trainer_state: digest of trainer_state.json, which rewards may read; empty where there is none.
        paths: path of each of these digests.
        assumptions: facts that the files do not record and that are assumed, one sentence each.
        read: settings that the configuration leaves open and that the checkpoints record; see `settings`.
        settings: all settings of the training, each with its source.
        warnings: warnings at the top of the report.
        dropout: whether dropout was on in the trainer's step.
        log: what its trainer logged near it; see `trainer_log`.
        recorded: the rollouts that are its U; None where U is sampled.
        named_base: digest of the quantised base that an adapter names, where it is probed on another one; else empty.
        after: digest of the weights of the next checkpoint, for the post-mortem; empty for none.
        learning_rates: of the steps on one rollout, over that of the first; empty if they are not followed.
        rehearsed_rates: of the steps of a rehearsal, over that of the first; empty if there is none.
    """

    directory: Path
    name: str
    step: int
    digest: str
    weights: str
    description: str
    base: str
    reference: tuple[str, ...]
    tokenizer: str
    trainer_state: str
    paths: Mapping[str, Path]
    assumptions: tuple[str, ...]
    read: Mapping[str, Any]
    settings: tuple[Setting, ...]
    warnings: tuple[str, ...]
    dropout: bool
    log: Mapping[str, Any]
    named_base: str
    recorded: RecordedU | None = None
    after: str = ""
    learning_rates: tuple[float, ...] = ()
    rehearsed_rates: tuple[float, ...] = ()


def preflight(config: ProbeConfig) -> list[CheckpointToProbe]:
    """Check everything that the configuration names, without loading weights or sampling.

    Args:
        config: configuration of the sweep.

    Returns:
        The checkpoints, ordered by step.

    Raises:
        ProbeError: something is missing, broken or too small; the message says how to fix it.
    """
    _check_workers(config.execution)
    _check_arithmetic(config)
    _check_sampler(config)
    usable, warnings = usable_checkpoints(config)
    usable, recorded, without = recorded_of_each(config, usable)
    settled = with_sizes(config, settle(config, {one.name: one.trainer for one in usable}), recorded)
    warnings += [*without, *settled.warnings]
    steps = [one.checkpoint.step for one in usable if one.checkpoint.layout.optimizer is None]
    if max(steps, default=0):
        warnings.append(f"The optimizer is taken to be fresh, and the trainer had made {max(steps)} steps.")
    bases = {one.name: comparable_base(one.checkpoint.layout) for one in usable if one.trainer.quantised_base}
    warnings += dict.fromkeys(why for _, why in bases.values() if why)
    for warning in warnings:
        log.warning("%s", warning)
    named = {name: home for name, (home, _) in bases.items()}
    checked = _checked(with_read(config, settled.read), usable, settled, tuple(warnings), recorded, named)
    for one in usable:
        require_unwritten(one.checkpoint.layout.directory, (one.digest, one.files))
    return checked


def _checked(
    config: ProbeConfig,
    usable: Sequence[UsableCheckpoint],
    settled: Settled,
    warnings: tuple[str, ...],
    recorded: Mapping[str, RecordedU],
    named_bases: Mapping[str, Path | None],
) -> list[CheckpointToProbe]:
    """Check the prompts, the reward and the loss, and that each checkpoint fits them."""
    _check_shards(config)
    check_weights(config)
    for key, asked in (
        ("update.phase.follow", config.update.phase.follow),
        ("lab.rehearse", config.lab.rehearse.steps),
    ):
        if asked:
            _check_states(usable, key)
    state = _trainer_state(usable[0].checkpoint.layout.directory)
    rewarded = bool(recorded) and all(of_one.rewarded(config) for of_one in recorded.values()) and not config.price
    pools = checked_pools(config, None if rewarded else state)
    encoded: dict[str, dict[str, tuple[Pool, list[list[int]]]]] = {}  # by tokenizer and split
    found = []
    trainers = [one.trainer for one in usable]
    for name, checkpoint, trainer, digest, _, weights, description, base, home, tokenizer in usable:
        layout = checkpoint.layout
        paths = {digest: layout.directory, weights or description: layout.model, tokenizer: home}
        paths |= {base: layout.base} if layout.base else {}
        saved = layout.directory / TRAINER_STATE
        state_digest = file_digest(saved) if saved.is_file() else ""
        paths |= {state_digest: saved} if state_digest else {}
        paths |= {optimizer_digest(layout.optimizer): layout.optimizer} if layout.optimizer else {}
        of_one = recorded.get(name)
        to_score = config.update.kl_beta and not (of_one and of_one.referenced(config))
        compared, about = reference_of(config, layout, name) if to_score else ({}, ())
        paths |= compared
        if tokenizer not in encoded:
            encoded[tokenizer] = encoded_pools(config, pools, home, None if rewarded else state)
        longest = max(len(ids) for _, token_ids in encoded[tokenizer].values() for ids in token_ids)
        check_positions(checkpoint, longest, config.generation.max_new_tokens)
        about_u: tuple[str, ...] = ()
        if of_one:
            paths |= of_one.files
            about_u = check_recorded(config, of_one, encoded[tokenizer][config.splits[1]], home, layout)
        named = named_bases.get(name)
        of_named = weights_digest(named) if named else ""
        paths |= {of_named: named} if named else {}
        if after := weights_after(config, layout, checkpoint.step):
            paths |= dict([after])
        elif config.post_mortem:
            about_u += (f"No post-mortem of {name}: the checkpoint of the next step is not beside it.",)
        phase, rehearse = config.update.phase, config.lab.rehearse
        along = partial(_learning_rates, name, layout.directory, trainer)
        learning_rates, about_phase = along(phase.steps, phase.learning_rates, "the phase")
        is_last = name == usable[-1].name  # the one that is rehearsed
        rehearsed_rates, about_rehearsal = along(
            rehearse.steps if is_last else 0, rehearse.learning_rates, "the rehearsal"
        )
        found.append(
            CheckpointToProbe(
                directory=layout.directory.resolve(),
                name=name,
                step=checkpoint.step,
                digest=digest,
                weights=weights,
                description=description,
                base=base,
                reference=tuple(compared),
                tokenizer=tokenizer,
                trainer_state=state_digest,
                paths={digest: path.resolve() for digest, path in paths.items()},
                assumptions=(*checkpoint.assumptions, *settled.notes, *about),
                read=settled.read,
                settings=settled.settings,
                warnings=(*warnings, *about_u, *about_phase, *about_rehearsal),
                dropout=trainer.drops,
                log=trainer_log(checkpoint.step, trainer, trainers),
                recorded=of_one,
                named_base=of_named,
                after=after[0] if after else "",
                learning_rates=learning_rates,
                rehearsed_rates=rehearsed_rates,
            )
        )
    if config.policy.base_model and not any(one.base or one.description for one in found):
        raise ConfigError(
            f"policy.base_model is {config.policy.base_model!r}, and no checkpoint is an adapter or in shards",
            fix="leave it out, or give the directories of adapters",
        )
    return found


def settled_config(config: ProbeConfig, checkpoints: Sequence[CheckpointToProbe]) -> ProbeConfig:
    """Complete the configuration of a sweep: what it leaves open is taken from its checkpoints.

    Args:
        config: the configuration that `preflight` was given.
        checkpoints: checkpoints from `preflight`.
    """
    return with_read(config, checkpoints[0].read)


def _trainer_state(directory: Path) -> dict[str, Any]:
    """What a trainer saved of its state, which rewards are given."""
    return read_json(directory / TRAINER_STATE) if (directory / TRAINER_STATE).is_file() else {}


MOST_SHARDS = 10_000
"""Per checkpoint. Each shard costs several stage runs, folders and keys; with more, these would outweigh the work."""


def _check_shards(config: ProbeConfig) -> None:
    """Refuse a sweep with too many shards."""
    batch, size = config.batch_config, config.execution.shard_size
    replacement = batch.E_sampling_mode == "replacement"
    in_e = batch.E_total_sequences if replacement else batch.B_E_values[0] * batch.G
    rehearse = config.lab.rehearse
    rehearsed = 1 + rehearsed_interventions(config) if rehearse.steps else 0
    passes = batch.E_replicates + len(config.importance.etas) + config.update.phase.followed
    passes += rehearsed * rehearse.measured
    updates = 1 + rehearsed * rehearse.seeds * rehearse.steps
    sequences = in_e * passes + batch.B_U * batch.G * updates
    shards = -(-in_e // size) * passes + -(-batch.B_U * batch.G // size) * updates
    if shards > MOST_SHARDS:
        raise ConfigError(
            f"this sweep has {shards} shards of {size} sequences per checkpoint, and {MOST_SHARDS} are possible",
            fix=f"set execution.shard_size to at least {-(-2 * sequences // MOST_SHARDS)}",
        )


def _check_states(usable: Sequence[UsableCheckpoint], key: str) -> None:
    """Refuse to take several steps with an optimizer whose state after a step is not known."""
    for one in usable:
        rules = [RULES[group.rule] for group in one.checkpoint.optimizer.groups]
        if unknown := [rule.name for rule in rules if not rule.has_after]:
            raise ConfigError(
                f"{key}: {one.name} is of {unknown[0]}, whose moments after a step are not modelled",
                fix="leave it out: the first step is predicted and measured as ever",
            )


def _check_workers(execution: ExecutionConfig) -> None:
    """Refuse workers that cannot be had, and a device that is not there; which ones Ray has is known when it runs."""
    if execution.workers != "ray":
        check_device(execution.device)
        gpus = torch.cuda.device_count() if execution.device != "cpu" and torch.cuda.is_available() else 0
        if gpus and execution.devices_per_policy > gpus:
            raise ConfigError(
                f"execution.devices_per_policy is {execution.devices_per_policy}, and torch finds {gpus} GPUs here",
                cause="CUDA_VISIBLE_DEVICES leaves some out, or the machine has no more",
                fix=f"set it to {gpus} at most, or run where there are more",
            )
    elif find_spec("ray") is None:
        raise ConfigError(
            "execution.workers is ray, and Ray is not installed",
            fix="pip install -e '.[ray]', on every machine of the cluster, or use workers: pool",
        )


def _learning_rates(
    name: str, directory: Path, trainer: TrainerFiles, steps: int, given: Sequence[float], along: str
) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """The learning rates of some steps from a checkpoint over that of the first, and what is to be said of them."""
    if not steps:
        return (), ()
    if given:
        return tuple([*given, *[given[-1]] * steps][:steps]), ()
    try:
        return factors_to_come(directory, trainer.arguments, steps), ()
    except UnknownScheduleError as why:
        return (1.0,) * steps, (f"The learning rate after {name} stays what it is along {along}: {why}.",)


def check_device(device: str) -> None:
    """Refuse a device that is not there. Raises ConfigError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"execution.device is cuda, and torch {torch.__version__} finds no GPU on this machine",
            cause="a torch without CUDA, a driver that is missing or too old, or CUDA_VISIBLE_DEVICES",
            fix="set execution.device: auto or cpu, or run where there is one",
        )


def _check_sampler(config: ProbeConfig) -> None:
    """Refuse vLLM where it is not, and for a policy that is divided among devices."""
    if config.generation.sampler != "vllm":
        return
    vllm_version(config.execution.vllm_python)
    if config.execution.devices_per_policy > 1:
        raise ConfigError(
            "generation.sampler is vllm, and execution.devices_per_policy is above 1: our draws are made on one device",
            fix="set generation.sampler: bf16, whose layers are divided as well",
        )


def _check_arithmetic(config: ProbeConfig) -> None:
    """Refuse TF32 on a CPU, which has none."""
    elsewhere = config.execution.workers == "ray"  # on machines that may have one
    without = config.execution.device == "cpu" or not (elsewhere or torch.cuda.is_available())
    if config.policy.arithmetic == "tf32" and without:
        raise ConfigError(
            "policy.arithmetic is tf32, and the policy runs on a CPU, which has no TF32",
            cause="execution.device is cpu, or auto on a machine without a GPU",
            fix="set policy.arithmetic: full, or run where there is a GPU",
        )

"""Check a sweep before any expensive work starts."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from entropy_core.checkpoints.architecture import read_architecture
from entropy_core.checkpoints.checkpoint import Checkpoint
from entropy_core.checkpoints.content import read_json
from entropy_core.checkpoints.layout import Layout, find_layout
from entropy_core.checkpoints.tokenizer import load_tokenizer
from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import CheckpointError, ConfigError
from entropy_core.files.checkpoint import optimizer_digest, weights_digest
from entropy_core.files.digests import file_digest
from entropy_core.losses.apart import check_loss
from entropy_core.losses.interventions import own_interventions
from entropy_core.losses.token_weights import check_token_weights
from entropy_core.numerics import philox
from entropy_core.numerics.philox import Purpose
from entropy_core.numerics.rules import RULES
from entropy_core.pipeline.named_base import comparable_base
from entropy_core.pipeline.patterns import require_quick_patterns
from entropy_core.pipeline.recorded_u import RecordedU, check_recorded, recorded_of_each, with_sizes
from entropy_core.pipeline.settings import Setting, Settled, check_weights, settle, with_read
from entropy_core.pipeline.trainer_log import trainer_log
from entropy_core.pipeline.usable import UsableCheckpoint, usable_checkpoints
from entropy_core.prompts import pools as prompts
from entropy_core.prompts.pools import Pool
from entropy_core.prompts.tokens import encode
from entropy_core.rewards import functions as rewards

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


def preflight(config: ProbeConfig) -> list[CheckpointToProbe]:
    """Check everything that the configuration names, without loading weights or sampling.

    Args:
        config: configuration of the sweep.

    Returns:
        The checkpoints, ordered by step.

    Raises:
        ProbeError: something is missing, broken or too small; the message says how to fix it.
    """
    check_device(config.execution.device)
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
    return _checked(with_read(config, settled.read), usable, settled, tuple(warnings), recorded, named)


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
    if config.update.phase.follow:
        _check_states(usable)
    state = _trainer_state(usable[0].checkpoint.layout.directory)
    rewarded = bool(recorded) and all(of_one.rewarded(config) for of_one in recorded.values()) and not config.price
    pools = _pools(config, None if rewarded else state)
    encoded: dict[str, dict[str, tuple[Pool, list[list[int]]]]] = {}  # by tokenizer and split
    found = []
    trainers = [one.trainer for one in usable]
    for name, checkpoint, trainer, digest, weights, description, base, home, tokenizer in usable:
        layout = checkpoint.layout
        paths = {digest: layout.directory, weights or description: layout.model, tokenizer: home}
        paths |= {base: layout.base} if layout.base else {}
        saved = layout.directory / TRAINER_STATE
        state_digest = file_digest(saved) if saved.is_file() else ""
        paths |= {state_digest: saved} if state_digest else {}
        paths |= {optimizer_digest(layout.optimizer): layout.optimizer} if layout.optimizer else {}
        of_one = recorded.get(name)
        to_score = config.update.kl_beta and not (of_one and of_one.referenced(config))
        compared, about = _reference(config, layout, name) if to_score else ({}, ())
        paths |= compared
        if tokenizer not in encoded:
            encoded[tokenizer] = _encoded(config, pools, home, None if rewarded else state)
        longest = max(len(ids) for _, token_ids in encoded[tokenizer].values() for ids in token_ids)
        _check_positions(checkpoint, longest, config.generation.max_new_tokens)
        about_u: tuple[str, ...] = ()
        if of_one:
            paths |= of_one.files
            about_u = check_recorded(config, of_one, encoded[tokenizer][config.splits[1]], home, layout)
        named = named_bases.get(name)
        of_named = weights_digest(named) if named else ""
        paths |= {of_named: named} if named else {}
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
                warnings=(*warnings, *about_u),
                dropout=trainer.drops,
                log=trainer_log(checkpoint.step, trainer, trainers),
                recorded=of_one,
                named_base=of_named,
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


TRAINER_STATE = "trainer_state.json"


def _trainer_state(directory: Path) -> dict[str, Any]:
    """What a trainer saved of its state, which rewards are given."""
    return read_json(directory / TRAINER_STATE) if (directory / TRAINER_STATE).is_file() else {}


def _pools(config: ProbeConfig, state: Mapping[str, Any] | None) -> dict[str, Pool]:
    """Load the prompts of each split. Check them and the loss as far as that is possible without a tokenizer.

    Without a state the rewards are not called, as where they were recorded.
    """
    batch = config.batch_config
    isolation, longest = config.execution.isolation, config.generation.max_new_tokens
    check_loss(config.update.loss, config.update.kl_beta, longest, isolation)
    for name in own_interventions(config.interventions):
        check_token_weights(name, longest, isolation)
    located = prompts.locate(batch.dataset_name, batch.dataset_path, batch.allow_download)
    pools = {
        split: prompts.load_pool(
            batch.dataset_name, split, batch.prompt_column, located, batch.dataset_options, batch.dataset_config
        )
        for split in dict.fromkeys(config.splits)
    }
    if not batch.max_prompt_length:
        _check_batches(config, pools, state)
    return pools


MOST_SHARDS = 10_000
"""Per checkpoint. Each shard costs several stage runs, folders and keys; with more, these would outweigh the work."""


def _check_shards(config: ProbeConfig) -> None:
    """Refuse a sweep with too many shards."""
    batch, size = config.batch_config, config.execution.shard_size
    replacement = batch.E_sampling_mode == "replacement"
    in_e = batch.E_total_sequences if replacement else batch.B_E_values[0] * batch.G
    passes = batch.E_replicates + len(config.importance.etas) + config.update.phase.steps
    sequences = in_e * passes + batch.B_U * batch.G
    shards = -(-in_e // size) * passes + -(-batch.B_U * batch.G // size)
    if shards > MOST_SHARDS:
        raise ConfigError(
            f"this sweep has {shards} shards of {size} sequences per checkpoint, and {MOST_SHARDS} are possible",
            fix=f"set execution.shard_size to at least {-(-2 * sequences // MOST_SHARDS)}",
        )


def _check_states(usable: Sequence[UsableCheckpoint]) -> None:
    """Refuse to take several steps with an optimizer whose state after a step is not known."""
    for one in usable:
        rules = [RULES[group.rule] for group in one.checkpoint.optimizer.groups]
        if unknown := [rule.name for rule in rules if not rule.has_after]:
            raise ConfigError(
                f"update.phase.follow: {one.name} is of {unknown[0]}, whose moments after a step are not modelled",
                fix="leave it out: the first step is predicted and measured as ever",
            )


def check_device(device: str) -> None:
    """Refuse a device that is not there. Raises ConfigError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"execution.device is cuda, and torch {torch.__version__} finds no GPU on this machine",
            cause="a torch without CUDA, a driver that is missing or too old, or CUDA_VISIBLE_DEVICES",
            fix="set execution.device: auto or cpu, or run where there is one",
        )


def _reference(config: ProbeConfig, layout: Layout, name: str) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Find the reference policy of the KL term: the configured one, else that of the trainer.

    TRL keeps the adapter that it began with in `ref/`; without one, the reference is the base without an adapter.

    Returns:
        Digest and directory of its weights, and then of its base if it is an adapter; and what to say of it.

    Raises:
        ConfigError: there is none.
        CheckpointError: it cannot be loaded, or has another vocabulary.
    """
    asked = config.update.reference
    if asked:
        of = find_layout(Path(asked), config.policy.base_model, fresh=True)
        about = f"The reference policy is {Path(asked).name}."
    elif layout.base is None:
        raise ConfigError(
            f"update.kl_beta is set, and {name} is no adapter, whose base would be the reference policy",
            fix="set update.reference to the directory that training started from",
        )
    elif (layout.model / "ref" / "adapter_config.json").exists():
        of, about = (
            find_layout(layout.model / "ref", layout.base, fresh=True),
            "The reference policy is that in `ref/`.",
        )
    else:
        of = find_layout(layout.base, fresh=True)
        about = "The reference policy is the base without its adapter."
    if of.shards is not None:
        raise ConfigError(
            f"the reference policy {of.directory} has its weights in shards, which are read of what is probed alone",
            fix="set update.reference to a directory with model.safetensors",
        )
    require_quick_patterns(of)
    theirs, ours = (read_architecture(one)[0].vocabulary for one in (of, layout))
    if theirs != ours:
        raise CheckpointError(
            f"the reference policy {of.directory} has {theirs} tokens, and {name} has {ours}",
            cause="it is not what training started from, or tokens were added for the training",
            fix="correct update.reference; or say update.kl_beta: 0",
        )
    return {weights_digest(directory): directory for directory in (of.model, of.base) if directory}, (about,)


def encoding(config: ProbeConfig) -> dict[str, Any]:
    """Return the keyword arguments of `prompts.tokens.encode`."""
    batch = config.batch_config
    return {
        "add_special_tokens": batch.add_special_tokens,
        "apply_chat_template": batch.apply_chat_template,
        "system_prompt": batch.system_prompt,
        "chat_template_kwargs": batch.chat_template_kwargs,
        "max_prompt_length": batch.max_prompt_length,
    }


def _check_batches(config: ProbeConfig, pools: Mapping[str, Pool], state: Mapping[str, Any] | None) -> None:
    """Check the prompt pools and the reward; the reward is not called without a state."""
    batch = config.batch_config
    e_split, u_split = config.splits
    e_pool, u_pool = pools[e_split].table, pools[u_split].table
    if not batch.U.source:  # whose prompts are drawn already
        _check_size("B_U", batch.B_U, u_pool, u_split)
    prompts_e = e_pool.num_rows
    if batch.E_sampling_mode == "distinct":
        prompts_e = batch.B_E_values[0]
        _check_size("B_E_values", prompts_e, e_pool, e_split)
    if config.units_of_e == "prompt" and prompts_e < 2:
        raise ConfigError(
            "prompts are the independent units of E, and there is one: a standard error needs two",
            cause="B_E_values of 1 in distinct mode, or variance.cluster: prompt with a pool of one prompt",
            fix="take more prompts, or E_sampling_mode: replacement with variance.cluster: auto",
        )
    if state is None:
        return
    # call the reward once on empty responses, to find one that cannot be called on U before sampling
    drawn = u_pool.take(philox.permutation(batch.U_batch_seed, Purpose.U_PROMPT, u_pool.num_rows)[: batch.B_U].tolist())
    columns = {name: drawn[name].to_pylist() for name in drawn.column_names if name != "prompt"}
    given = drawn["prompt"].to_pylist(), [""] * drawn.num_rows, columns, config.execution.isolation
    one_token = [[0]] * drawn.num_rows  # a response has one at least, the one that ends it
    for name in config.update.rewards:
        rewards.compute_rewards(name, *given, token_ids=one_token, trainer_state=state)


def _check_size(key: str, wanted: int, pool: pa.Table, split: str) -> None:
    if wanted > pool.num_rows:
        raise ConfigError(
            f"batch_config.{key} asks for {wanted} distinct prompts, but split {split!r} has {pool.num_rows}",
            fix=f"set {key} to at most {pool.num_rows}, or use a larger pool",
        )


def _encoded(
    config: ProbeConfig, pools: Mapping[str, Pool], directory: Path, state: Mapping[str, Any] | None
) -> dict[str, tuple[Pool, list[list[int]]]]:
    """The remaining prompts of each split and their token ids, with the checkpoint's own tokenizer."""
    tokenizer, found = load_tokenizer(directory), {}
    for split, pool in pools.items():
        found[split] = encode(pool, tokenizer, **encoding(config))
        for note in found[split][0].notes:
            log.warning("split %s: %s", split, note)
    if config.batch_config.max_prompt_length:
        _check_batches(config, {split: kept for split, (kept, _) in found.items()}, state)
    return found


def _check_positions(checkpoint: Checkpoint, longest: int, max_new_tokens: int) -> None:
    """Refuse sequences that are longer than the model's position embeddings, on which a forward pass would fail."""
    tables = [
        shape[0]
        for name, shape in checkpoint.model_shapes.items()
        if len(shape) == 2 and re.search(r"(^|\.)(wpe|embed_positions|position_embeddings)\.weight$", name)
    ]
    if tables and longest + max_new_tokens > min(tables):
        raise ConfigError(
            f"prompts of up to {longest} tokens and max_new_tokens of {max_new_tokens} do not fit into the "
            f"{min(tables)} positions of {checkpoint.layout.directory}",
            fix=f"set generation.max_new_tokens to at most {min(tables) - longest}, or use shorter prompts",
        )

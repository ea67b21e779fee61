"""Check prompts and rewards before a sweep begins: there are enough, they fit, and the reward can be called."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from entropy_core.checkpoints.checkpoint import Checkpoint
from entropy_core.checkpoints.tokenizer import load_tokenizer
from entropy_core.config.schema import ProbeConfig
from entropy_core.errors import ConfigError
from entropy_core.losses.apart import check_loss
from entropy_core.losses.interventions import own_interventions
from entropy_core.losses.token_weights import check_token_weights
from entropy_core.numerics import philox
from entropy_core.numerics.philox import Purpose
from entropy_core.prompts import pools as prompts
from entropy_core.prompts.pools import Pool
from entropy_core.prompts.tokens import encode
from entropy_core.rewards import functions as rewards

log = logging.getLogger("entropy_probe.preflight")


def checked_pools(config: ProbeConfig, state: Mapping[str, Any] | None) -> dict[str, Pool]:
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


def encoded_pools(
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


def check_positions(checkpoint: Checkpoint, longest: int, max_new_tokens: int) -> None:
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

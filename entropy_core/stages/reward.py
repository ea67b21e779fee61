"""reward-u-batch and reward-e-batch: compute the reward of every response of a batch."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from entropy_core.errors import RewardError
from entropy_core.files import functions as user_functions
from entropy_core.numerics.advantages import Aggregation, normalised_within_groups, weighted_sum
from entropy_core.rewards.functions import compute_rewards
from entropy_core.rewards.spec import RewardSpec

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Prompts, Sequences


def reward(
    out: "Writer",
    execution: "Execution",
    *,
    sequences: "Sequence[Sequences]",
    prompts: "Prompts",
    rewards: Sequence[RewardSpec],
    weights: Sequence[float],
    aggregation: Aggregation,
    responses_per_prompt: int,
    trainer_state: str,
) -> dict[str, Any]:
    """Compute the rewards of the responses of a batch.

    Args:
        out: writer of `rewards.parquet`, one row per sequence: `reward`, the weighted sum, null where every function
            returned None; `reward_1`, `reward_2`, … of several functions; and `normalised_reward`, the weighted sum of
            what was normalised within groups, if that is asked for.
        execution: path of the users' reward files, and limits of their processes.
        sequences: shards of sample-u-batch or sample-e-batch.
        prompts: artifact of load-prompts; all its columns are passed to the rewards.
        rewards: the reward functions.
        weights: of each; none: all 1.
        aggregation: how several become one.
        responses_per_prompt: G.
        trainer_state: digest of the checkpoint's trainer_state.json; empty where there is none.

    Returns:
        Summary: mean and number of rewards, and how many responses have none.

    Raises:
        RewardError: a function fails, or no response has a reward.
    """
    table = pa.concat_tables([shard.table("sequences.parquet") for shard in sequences])
    pool = prompts.table("prompts.parquet").take(table["prompt_id"])
    columns = {name: pool[name].to_pylist() for name in pool.column_names if name != "prompt"}
    token_ids = [ids for shard in sequences for ids in _token_ids(shard)]
    state = json.loads(execution.paths[trainer_state].read_text(encoding="utf-8")) if trainer_state else {}
    found: list[list[float | None]] = [
        compute_rewards(
            user_functions.in_file(spec.name, execution.paths[spec.source] if spec.source else None),
            pool["prompt"].to_pylist(),
            table["response"].to_pylist(),
            columns,
            execution.isolation,
            token_ids=token_ids,
            trainer_state=state,
        )
        for spec in rewards
    ]
    rewards_NF = torch.tensor(
        [[torch.nan if value is None else value for value in row] for row in zip(*found, strict=True)],
        dtype=torch.float64,
    )
    weights_F = torch.tensor(weights or [1.0] * len(rewards), dtype=torch.float64)
    total_N = weighted_sum(rewards_NF, weights_F)
    if total_N.isnan().all():
        raise RewardError(
            "no response has a reward: every function returned None for every response",
            cause="the functions were written for other prompts",
            fix="correct update.reward, or the columns that it reads",
        )
    of_sequences = {"sequence_id": table["sequence_id"], "prompt_id": table["prompt_id"], "reward": _or_null(total_N)}
    if len(rewards) > 1:
        of_sequences |= {f"reward_{number}": pa.array(one, pa.float64()) for number, one in enumerate(found, start=1)}
    if aggregation == "normalize_then_sum":
        normalised_NF = normalised_within_groups(rewards_NF, responses_per_prompt)
        normalised_N = (normalised_NF * weights_F).nansum(dim=1).masked_fill(total_N.isnan(), torch.nan)
        of_sequences["normalised_reward"] = _or_null(normalised_N)
    out.table(pa.table(of_sequences), "rewards.parquet")
    return {"mean_reward": float(total_N.nanmean()), "sequences": len(total_N), "open": int(total_N.isnan().sum())}


def _token_ids(shard: "Sequences") -> list[list[int]]:
    tokens = shard.tensors("tokens.safetensors")
    return [row.tolist() for row in tokens["response_tokens"].split(tokens["response_offsets"].diff().tolist())]


def _or_null(values_N: torch.Tensor) -> pa.Array:
    return pa.array(values_N.numpy(), from_pandas=True)  # NaN as null

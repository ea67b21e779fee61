"""reward-u-batch: compute the reward of every response of U."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from entropy_core.files import functions as user_functions
from entropy_core.rewards.functions import compute_rewards

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Prompts, SequencesOfU


def reward(
    out: "Writer",
    execution: "Execution",
    *,
    sequences: "Sequence[SequencesOfU]",
    prompts: "Prompts",
    reward_name: str,
    source: str,
    library: str,
) -> dict[str, Any]:
    """Compute the rewards of the responses of U.

    Args:
        out: writer of `rewards.parquet`, one row per sequence.
        execution: path of a user's reward file, and limits of its process.
        sequences: shards of sample-u-batch.
        prompts: artifact of load-prompts; all its columns are passed to the reward.
        reward_name: name of the reward, as in `rewards.functions.load_reward`, but `function` for `file.py:function`.
        source: digest of the file that defines the reward; empty for a built-in reward.
        library: library that the reward uses, with its version, as part of the key; empty if there is none.

    Returns:
        Summary: mean and number of rewards.
    """
    table = pa.concat_tables([shard.table("sequences.parquet") for shard in sequences])
    pool = prompts.table("prompts.parquet").take(table["prompt_id"])
    columns = {name: pool[name].to_pylist() for name in pool.column_names if name != "prompt"}
    file = execution.paths[source] if source else None
    name = user_functions.in_file(reward_name, file)
    prompts_N, responses_N = table["prompt"].to_pylist(), table["response"].to_pylist()
    rewards = compute_rewards(name, prompts_N, responses_N, columns, execution.isolation)
    out.table(
        pa.table({"sequence_id": table["sequence_id"], "prompt_id": table["prompt_id"], "reward": rewards}),
        "rewards.parquet",
    )
    return {"mean_reward": sum(rewards) / len(rewards), "sequences": len(rewards)}

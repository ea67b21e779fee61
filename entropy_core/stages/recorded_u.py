"""recorded-u-batch: the update batch U as a trainer recorded it, in place of one that is sampled and rewarded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from entropy_core.policy.spec import PolicySpec, policy_of
from entropy_core.prompts.conversations import is_conversational
from entropy_core.prompts.rollout_files import read_rollouts
from entropy_core.prompts.rollouts import Ends, Pool, as_batch, in_groups
from entropy_core.sequences.files import write_sequences

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Prompts


def recorded_u(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    prompts: "Prompts",
    sources: Sequence[str],
    number: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Read the rollouts of one step of a training.

    Args:
        out: writer of `tokens.safetensors` and `sequences.parquet`, as sample-u-batch leaves them, the latter with
            `recorded_advantage`; of `rewards.parquet`, as reward-u-batch does, if rewards were recorded; and of
            `recorded.safetensors`, with what was recorded of each token: old_logprobs, sampling_logprobs,
            ref_logprobs, nats.
        execution: paths of the files.
        policy: whose vocabulary and EOS tokens they must be in.
        prompts: artifact of load-prompts.
        sources: content digests of the files with the rollouts.
        number: of the step, as the files count.
        max_new_tokens: maximum response length.

    Returns:
        Summary: numbers of sequences, tokens, cut responses and those that end in neither way; whether texts were
        tokenised; and which of `OF_TOKENS` were recorded.
    """
    model = policy_of(policy, execution)
    files = [execution.paths[source] for source in sources]
    table = prompts.table("prompts.parquet")
    pool = Pool(table["prompt"].to_pylist(), prompts.table("prompt_tokens.parquet")["token_ids"].to_pylist())
    ends = Ends(model.eos_token_ids, max_new_tokens, model.model.get_input_embeddings().weight.shape[0])
    groups = in_groups(read_rollouts(files, number), files[0].name)
    batch = as_batch(groups, pool, model.tokenizer, ends, files[0].name)
    sequences, decode = batch.sequences, model.tokenizer.decode
    write_sequences(out, sequences)
    drawn_N = sequences.prompt_ids_N.tolist()
    in_template = is_conversational(table)
    of_sequences = {"sequence_id": sequences.sequence_ids_N.tolist(), "prompt_id": drawn_N}
    advantages = [None] * len(sequences) if batch.advantages_N is None else batch.advantages_N.tolist()
    out.table(
        pa.table(
            of_sequences
            | {
                "draw": sequences.draws_N.tolist(),
                "prompt": [decode(pool.token_ids[i]) for i in drawn_N]
                if in_template
                else table["prompt"].take(drawn_N),
                "response": [decode(sequences.response(i), skip_special_tokens=True) for i in range(len(sequences))],
                "length": sequences.lengths_N.tolist(),
                "finish_reason": list(sequences.finish_reasons),
                "recorded_advantage": pa.array(advantages, pa.float64()),
            }
        ),
        "sequences.parquet",
    )
    if batch.rewards_N is not None:
        out.table(pa.table(of_sequences | {"reward": pa.array(batch.rewards_N, pa.float64())}), "rewards.parquet")
    sequences.table(batch.of_tokens).write(out, "recorded.safetensors")
    return {
        "sequences": len(sequences),
        "tokens": len(sequences.response_tokens_K),
        "cut": sequences.finish_reasons.count("length"),
        "stopped": sequences.finish_reasons.count("stop"),
        "retokenised": batch.retokenised,
        "of_tokens": sorted(batch.of_tokens),
    }

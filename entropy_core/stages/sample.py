"""sample-e-batch and sample-u-batch: sample responses to prompts of the pool, one shard at a time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from entropy_core.policy.spec import PolicySpec, ProposalSpec
from entropy_core.prompts.conversations import is_conversational
from entropy_core.sequences.files import write_sequences
from entropy_core.sequences.processor import processor_of
from entropy_core.sequences.vllm_engine import VllmDecoding

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Prompts


def sample(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    prompts: "Prompts",
    batch: Literal["E", "U"],
    mode: Literal["replacement", "distinct"],
    responses_per_prompt: int,
    seed: int,
    first: int,
    count: int,
    max_new_tokens: int,
    stop_strings: Sequence[str],
    proposal: ProposalSpec | None,
) -> dict[str, Any]:
    """Sample the sequences `first`, …, `first + count − 1` of a batch.

    Args:
        out: writer of `tokens.safetensors` (flat ids with offsets, and log q with a proposal) and `sequences.parquet`
            (one row per sequence).
        execution: device and decoding batch size.
        policy: the policy to sample from.
        prompts: artifact of load-prompts.
        batch: `E` or `U`, which use independent random streams.
        mode: prompts drawn with replacement and one response each, or distinct prompts.
        responses_per_prompt: G of the distinct mode; 1 otherwise.
        seed: seed of the batch.
        first: id of the first sequence.
        count: number of sequences.
        max_new_tokens: maximum response length.
        stop_strings: a response ends with the token that completes one of these strings.
        proposal: the law that draws in place of the policy; None for the policy.

    Returns:
        Summary: numbers of sequences, tokens and cut responses, and the attention kernel used.
    """
    table = prompts.table("prompts.parquet")
    law = proposal.law if proposal else None
    vllm = None
    if proposal and proposal.engine:
        vllm = VllmDecoding(execution.vllm_python, execution.vllm_memory, proposal.engine)
    processor = processor_of(policy, execution, max_new_tokens, stop_strings, law, vllm)
    pool = prompts.table("prompt_tokens.parquet")["token_ids"].to_pylist()
    processor.require_vocabulary(pool)
    if mode == "replacement":
        sequences = processor.generate_with_replacement_sampling(pool, count, seed, first)
    else:
        sequences = processor.generate_distinct(pool, count, responses_per_prompt, seed, batch, first)
    write_sequences(out, sequences)
    decode, drawn_N = processor.policy.tokenizer.decode, sequences.prompt_ids_N.tolist()
    in_template = is_conversational(table)
    out.table(
        pa.table(
            {
                "sequence_id": sequences.sequence_ids_N.tolist(),
                "prompt_id": drawn_N,
                "draw": sequences.draws_N.tolist(),
                "prompt": [decode(pool[i]) for i in drawn_N] if in_template else table["prompt"].take(drawn_N),
                "response": [decode(sequences.response(i), skip_special_tokens=True) for i in range(len(sequences))],
                "length": sequences.lengths_N.tolist(),
                "finish_reason": list(sequences.finish_reasons),
            }
        ),
        "sequences.parquet",
    )
    return {
        "sequences": len(sequences),
        "tokens": len(sequences.response_tokens_K),
        "cut": sequences.finish_reasons.count("length"),
        "attention": processor.policy.model.config._attn_implementation,
    }

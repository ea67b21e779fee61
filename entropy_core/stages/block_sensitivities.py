"""block-sensitivities: how the entropy on each of several blocks of E answers to every token of U."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.checkpoints.optimizer_step import OptimizerStep
from entropy_core.numerics.functional import FUNCTIONALS
from entropy_core.numerics.vectors import Block, Lazy, blocks_of, dot, in_blocks, times
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.batch import tokens_of
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.functional_gradient import functional_gradient, scored_batch
from entropy_core.sequences.processor import processor_of
from entropy_core.sequences.token_sensitivities import token_sensitivities
from entropy_core.store.columns import TokenTable

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Checkpoint, ScoresOfE, SequencesOfE, SequencesOfU, Update


def block_sensitivities(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfE]",
    scores: "Sequence[ScoresOfE]",
    sequences_u: "Sequence[SequencesOfU]",
    checkpoint: "Checkpoint",
    update: "Update",
    responses_per_prompt: int,
    blocks: int,
) -> dict[str, Any]:
    """The sensitivities of first-order-u along P∘∇H, for ∇H of several independent blocks of E.

    Any other weighting of the tokens of U then changes δH₁ by a sum over these, on every block, and the spread over the
    blocks is the error over E of that change. No gradient is kept.

    Args:
        out: `sensitivities.safetensors` (`KIND/BLOCK/logprob` and `…/entropy`, [K], KIND the entropy or the length of a
            response; nats or tokens per unit step and unit of coefficient); the factor of clipping is in them.
        execution: device and micro-batch.
        policy: whose sequences they are, and how it is computed.
        sequences: shards of sample-e-batch.
        scores: shards of score-e-batch.
        sequences_u: shards of sample-u-batch.
        checkpoint: artifact of load-checkpoint.
        update: artifact of compute-update.
        responses_per_prompt: number of responses of E to a prompt, all in the same block.
        blocks: number of blocks.

    Returns:
        For each block its number of sequences, H_tok and mean length, and by kind ⟨∇, part⟩ of the parts of the step.
    """
    processor = processor_of(policy, execution)
    model, settings = processor.policy, update.summary
    shards = [read_sequences(shard) for shard in sequences_u]
    of_u, e_batch = tokens_of(shards), scored_batch(sequences, scores)
    parameters = model.named_parameters()
    names = blocks_of(parameters)
    files = {name: update.vector(name) for name in ("direction", "gradient")}

    def stored(name: str) -> Lazy[Block]:
        return Lazy(names, lambda block: files[name].block(block).to(model.device_of[block.name]).double())

    direction = stored("direction")
    step = OptimizerStep(checkpoint, execution, parameters, stored("gradient"), settings["clip_factor"])
    parts = {name: step.part(name) for name in ("momentum", "decay", "direction")}

    block_N = e_batch.ids_N // responses_per_prompt % blocks
    columns: dict[str, Tensor] = {}
    summary = []
    for number in block_N.unique().tolist():
        mine_N = block_N == number
        entry: dict[str, Any] = {
            "sequences": int(mine_N.sum()),
            "H_tok": float(e_batch.entropy_N[mine_N].sum() / e_batch.length_N[mine_N].sum()),
            "mean_length": float(e_batch.length_N[mine_N].mean()),
        }
        for functional in FUNCTIONALS:
            covector = in_blocks(functional_gradient(processor, e_batch, functional, mine_N))
            pair = token_sensitivities(
                processor, shards, times(settings["clip_factor"], step.applied("preconditioned", covector))
            )
            for of, values_K in zip(("logprob", "entropy"), pair, strict=True):
                columns[f"{functional.name}/{number}/{of}"] = values_K.to(getattr(torch, policy.dtype))
            entry[functional.name] = _products(covector, parts, direction if settings["rounded"] else None)
            del covector  # before the next accumulator, which takes 8 bytes per parameter
        summary.append(entry)
    TokenTable(of_u.sequences_N, of_u.offsets_N1, columns).write(out, "sensitivities.safetensors")
    return {"blocks": summary}


def _products(
    covector: Mapping[Block, Tensor], parts: Mapping[str, Lazy[Block]], direction: Mapping[Block, Tensor] | None
) -> dict[str, float]:
    """⟨covector, part⟩ of the parts of a step, and of its rounding where `direction` is the rounded step."""
    found = {name: dot(covector, parts[name]) for name in ("momentum", "decay")}
    if direction is None:
        return found | {"rounding": 0.0}
    rounding = Lazy(list(covector), lambda block: direction[block] - parts["direction"][block])
    return found | {"rounding": dot(covector, rounding)}

"""half-sensitivities: how the entropy on each half of E answers to every token of U."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.checkpoints.optimizer_step import OptimizerStep
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.halves import HALVES, KINDS
from entropy_core.numerics.vectors import Block, Lazy, dots, remembered, times
from entropy_core.policy.spec import PolicySpec
from entropy_core.policy.vectors import stored_vector
from entropy_core.sequences.batch import tokens_of
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of
from entropy_core.sequences.token_sensitivities import token_sensitivities
from entropy_core.store.columns import TokenTable

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Attribution, Checkpoint, Gradient, SequencesOfU, Update


def half_sensitivities(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    sequences: "Sequence[SequencesOfU]",
    checkpoint: "Checkpoint",
    update: "Update",
    gradient: "Gradient",
    first_order_u: "Attribution",
) -> dict[str, Any]:
    """The sensitivities of first-order-u along P∘∇H, for ∇H of each half of E.

    Any other weighting of the tokens of U then changes δH₁ by a sum over these, on each half. Forward mode computes
    those of the first half. All of E is the mean of its halves, and what is missing to it is the second.

    Args:
        out: `sensitivities.safetensors` (`KIND/HALF/logprob` and `…/entropy`, [K], KIND the entropy or the length of a
            response; nats or tokens per unit step and unit of coefficient); the factor of clipping is in them.
        execution: device and micro-batch.
        policy: whose sequences they are, and how it is computed.
        sequences: shards of sample-u-batch.
        checkpoint: artifact of load-checkpoint.
        update: artifact of compute-update.
        gradient: artifact of entropy-gradient.
        first_order_u: artifact of first-order-u, for the sensitivities on all of E.

    Returns:
        `halves`: for each its number of sequences, H_tok and mean length, and by kind ⟨∇, part⟩ of the momentum, the
        decay and the rounding of the step.
    """
    processor = processor_of(policy, execution)
    model, settings = processor.policy, update.summary
    shards = [read_sequences(shard) for shard in sequences]
    of_u, whole = tokens_of(shards), first_order_u.tensors("sensitivities.safetensors")

    loss_gradient = remembered(stored_vector(update.vector("gradient"), model))
    step = OptimizerStep(checkpoint, execution, model.named_parameters(), loss_gradient, settings["clip_factor"])
    parts: dict[str, Lazy[Block]] = {name: step.part(name) for name in ("momentum", "decay")}
    if settings["rounded"]:
        direction, unrounded = stored_vector(update.vector("direction"), model), step.part("direction")
        parts["rounding"] = Lazy(list(direction), lambda block: direction[block] - unrounded[block])

    halves = [dict(half) for half in gradient.summary["halves"]]
    columns: dict[str, Tensor] = {}
    for kind in KINDS:
        covectors = [remembered(stored_vector(gradient.vector(f"{kind}_{half}"), model)) for half in HALVES]
        for half, covector in zip(halves, covectors, strict=True):
            half[kind] = {"rounding": 0.0} | dict(
                zip(parts, dots([(covector, p) for p in parts.values()]), strict=True)
            )
        first = token_sensitivities(
            processor, shards, times(settings["clip_factor"], step.applied("preconditioned", covectors[0]))
        )
        of_all = TokenPair(*(whole[f"preconditioned/{kind}/{of}"].double() for of in ("logprob", "entropy")))
        for number, pair in enumerate((first, _second_half(halves, of_all, first))):
            for of, values_K in zip(("logprob", "entropy"), pair, strict=True):
                columns[f"{kind}/{number}/{of}"] = values_K.to(getattr(torch, policy.dtype))
    TokenTable(of_u.sequences_N, of_u.offsets_N1, columns).write(out, "sensitivities.safetensors")
    return {"halves": halves}


def _second_half(halves: Sequence[Mapping[str, Any]], of_all: TokenPair, first: TokenPair) -> TokenPair:
    """What the second half has to be, so that the mean of both is that of all of E."""
    n_0, n_1 = (half["sequences"] for half in halves)
    return TokenPair(*(((n_0 + n_1) * a_K - n_0 * b_K) / n_1 for a_K, b_K in zip(of_all, first, strict=True)))

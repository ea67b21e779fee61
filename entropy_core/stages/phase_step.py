"""phase-step: one optimizer step of the phase that follows a rollout, on one of its minibatches, after those before it.

The policy that drew the rollout has the parameters θ. Earlier steps have moved them to θ + η·D, where η is the learning
rate, and D the sum of their steps per unit of it.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor

from entropy_core.losses.apart import token_coefficients
from entropy_core.losses.files import name_of, read_with
from entropy_core.losses.interventions import InterventionSpec, altered, changed_spec, terms_of
from entropy_core.losses.phase import PhaseSpec, minibatch_of
from entropy_core.losses.spec import LossSpec
from entropy_core.losses.taken_step import taken_step, write_step
from entropy_core.numerics import ragged
from entropy_core.numerics.altered_optimizer import Altered
from entropy_core.numerics.clipping import Clipped
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.interventions import Known, Term, Terms, add_up
from entropy_core.numerics.loss_batch import LossBatch
from entropy_core.numerics.losses import clipped_tokens, kept_by_the_off_policy_mask, kl
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.batch import BatchedSequences, tokens_of
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.moves import moved_by
from entropy_core.sequences.processor import SequenceProcessor, processor_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Checkpoint, PhaseStep, SequencesOfU, Update


def phase_step(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    checkpoint: "Checkpoint",
    sequences: "Sequence[SequencesOfU]",
    update: "Update",
    previous: "PhaseStep | None",
    phase: PhaseSpec,
    intervention: InterventionSpec | None,
    number: int,
    rate: float,
) -> dict[str, Any]:
    """Take one step: the loss of a minibatch at the policy as it is now, its gradient, and the optimizer's step on it.

    The first step is on-policy: the ℓ and h of the rollout are those of the step. Its direction on a single minibatch
    is v of compute-update, bit for bit.

    Args:
        out: receives the vector `direction` (D after the step) and each moment after it under the optimizer's name, by
            parameter name; `tokens.safetensors` (log_ratios, ℓ − ℓ_old of each token of the minibatch, nats); and
            `clipped.parquet`, a row per token whose ratio is cut.
        execution: device and micro-batch size.
        policy: the policy that drew U.
        checkpoint: artifact of load-checkpoint.
        sequences: shards of sample-u-batch.
        update: artifact of compute-update, which has the loss and its inputs at the rollout; none of its vectors is
            read.
        previous: artifact of the step before; None for the first one.
        phase: how the rollout is cut into minibatches, and its ratios are clipped.
        intervention: what is changed in the loss or in the optimizer; None: nothing. What it selects it selects at the
            rollout.
        number: of the step, from 0; after the last minibatch comes the first one again.
        rate: learning rate of the step over the nominal one, which is that of the first step.

    Returns:
        The number of steps taken and the moments that are kept; what the loss did with the tokens: shares of those that
        are clipped, of responses that the off-policy mask leaves out, estimates of KL divergences, the largest ratio;
        norm of the gradient and its clip factor; norms of the step and of D, per unit of the nominal learning rate.
    """
    processor = processor_of(policy, execution)
    shards = [read_sequences(shard) for shard in sequences]
    table, loss = tokens_of(shards), LossSpec(**update.summary["loss"])
    altered_by = Altered()
    if intervention is not None:
        loss, altered_by = changed_spec(loss, intervention), altered(intervention)
    altered_by = altered_by._replace(learning_rate=rate * altered_by.learning_rate)
    (rollout,) = read_with(update, table, [loss])
    terms = _terms(rollout, intervention)
    cut = [minibatch_of(term.batch, loss, phase, number % phase.minibatches) for term in terms]
    batches, chosen_M = [batch for batch, _ in cut], cut[0][1]
    chosen_K = ragged.token_index(rollout.offsets_N1, chosen_M)
    with ExitStack() as stack:
        if previous is not None:
            stack.enter_context(moved_by(processor, previous, checkpoint.summary["learning_rate"]))
            logprobs_K, entropies_K = _scored(processor, shards, chosen_M)
            batches = [replace(batch, logprobs_K=logprobs_K, entropies_K=entropies_K) for batch in batches]
        name = name_of(execution, loss.name, loss.source)
        parts = tuple(
            Term(batch, None if term.weights_K is None else term.weights_K[chosen_K])
            for term, batch in zip(terms, batches, strict=True)
        )
        of_batch = add_up(parts, [token_coefficients(name, batch, execution.isolation) for batch in batches])
        coefficients = TokenPair(*(_scattered(values_K, chosen_K, rollout.logprobs_K) for values_K in of_batch))
        max_norm = update.summary["max_grad_norm"]
        found = taken_step(coefficients, processor, shards, checkpoint, execution, max_norm, altered_by, previous)
        of_step = write_step(out, found, checkpoint, processor.policy, previous)
    batch = batches[0]
    known = None if loss.source else clipped_tokens(loss.name, batch)
    log_ratio_K = batch.logprobs_K - batch.old_logprobs_K
    replace(table.select(chosen_M), columns={"log_ratios": log_ratio_K}).write(out)
    out.table(_clipped(known, batch, rollout, shards, chosen_M, processor), "clipped.parquet")
    return {
        "steps": number + 1,
        "rate": rate,
        **of_step,
        **_of_the_ratios(batch),
        **{f"clip_{side}": None for side in Clipped._fields},
        **{f"clip_{side}": _share(batch, cut_K) for side, cut_K in (known._asdict() if known else {}).items()},
    }


def _terms(rollout: LossBatch, intervention: InterventionSpec | None) -> Terms:
    """The terms of the loss on the whole rollout."""
    if intervention is None:
        return (Term(rollout),)
    nothing_K = torch.zeros_like(rollout.logprobs_K)  # what is followed does not select by these
    return terms_of(intervention, Known(rollout, nothing_K, nothing_K, intervention.seed))


def _scored(
    processor: SequenceProcessor, shards: Sequence[BatchedSequences], chosen_M: Tensor
) -> tuple[Tensor, Tensor]:
    """ℓ and h of the minibatch at the policy as it is now, float64 [K]."""
    start, parts = 0, []
    for shard in shards:
        of_shard = chosen_M[(chosen_M >= start) & (chosen_M < start + len(shard))] - start
        start += len(shard)
        if len(of_shard):
            parts.append(processor.score(shard.select(of_shard))[0])
    return torch.cat([p.logprobs_K for p in parts]).double(), torch.cat([p.entropies_K for p in parts]).double()


def _scattered(values_K: Tensor, index_K: Tensor, like_K: Tensor) -> Tensor:
    return torch.zeros_like(like_K).index_copy_(0, index_K, values_K)


def _clipped(
    known: Clipped | None,
    batch: LossBatch,
    rollout: LossBatch,
    shards: Sequence[BatchedSequences],
    chosen_M: Tensor,
    processor: SequenceProcessor,
) -> pa.Table:
    """The tokens whose ratios are cut: whose they are, where, their text, and what they were at the rollout."""
    cut_K = known.any & (batch.mask_K > 0) if known else torch.zeros_like(batch.mask_K, dtype=torch.bool)
    chosen_K = ragged.token_index(rollout.offsets_N1, chosen_M)
    of_token_K, within_K = ragged.sequence_index(batch.offsets_N1), ragged.position_index(batch.offsets_N1)
    by_side = [(side, of_K[cut_K].tolist()) for side, of_K in (known._asdict() if known else {}).items()]
    sides = [next(side for side, of in by_side if of[i]) for i in range(int(cut_K.sum()))]
    ids_N = torch.cat([shard.sequence_ids_N for shard in shards])
    tokens = torch.cat([shard.response_tokens_K for shard in shards])[chosen_K][cut_K].tolist()
    return pa.table(
        {
            "sequence_id": pa.array(ids_N[chosen_M][of_token_K[cut_K]].tolist(), pa.int64()),
            "position": pa.array(within_K[cut_K].tolist(), pa.int64()),
            "token": pa.array(tokens, pa.int64()),
            "text": pa.array([processor.policy.tokenizer.decode([token]) for token in tokens], pa.string()),
            "side": pa.array(sides, pa.string()),
            "ratio": pa.array((batch.logprobs_K - batch.old_logprobs_K)[cut_K].exp().tolist(), pa.float64()),
            "advantage": pa.array(batch.of_tokens(batch.advantages_N)[cut_K].tolist(), pa.float64()),
            "old_logprob": pa.array(batch.old_logprobs_K[cut_K].tolist(), pa.float64()),
            "old_entropy": pa.array(rollout.entropies_K[chosen_K][cut_K].tolist(), pa.float64()),
        }
    )


def _of_the_ratios(batch: LossBatch) -> dict[str, Any]:
    """What the ratios say of the tokens that count."""
    log_ratio_K = batch.logprobs_K - batch.old_logprobs_K
    counts_K = batch.mask_K > 0
    kept_N = kept_by_the_off_policy_mask(batch)
    return {
        "approx_kl": _share(batch, log_ratio_K.expm1() - log_ratio_K),
        "reference_kl": _share(batch, kl(batch)) if batch.reference_logprobs_K is not None else None,
        "largest_ratio": float(log_ratio_K[counts_K].exp().max()) if counts_K.any() else 1.0,
        "left_out": float(1.0 - kept_N.mean()),
        "entropy_of_minibatch": _share(batch, batch.entropies_K),
    }


def _share(batch: LossBatch, values_K: Tensor) -> float:
    """Mean over the tokens that count."""
    return float((batch.mask_K * values_K).sum() / batch.mask_K.sum().clamp_min(1))

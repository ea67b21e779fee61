"""post-mortem: which parts of the step that a trainer really took changed the entropy, from cached columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from entropy_core.estimates import measurement
from entropy_core.estimates.batches import evaluation_batch, moved_batch
from entropy_core.estimates.post_mortem import POST_MORTEM, Shares, rows_of, sampler_of
from entropy_core.estimates.rows import change_of
from entropy_core.estimates.tables import to_table
from entropy_core.numerics.choices import Baseline, Normalization
from entropy_core.numerics.halves import KINDS, by_normalization, entropy_and_length
from entropy_core.store.columns import read_tokens

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import (
        AlongV,
        AtStepSize,
        Attribution,
        MovedScores,
        RealStep,
        Recorded,
        ScoresOfE,
        ScoresOfU,
    )


def post_mortem(
    out: "Writer",
    execution: "Execution",
    *,
    real: "RealStep",
    moved: "Sequence[MovedScores]",
    attribution: "Attribution",
    recorded: "Recorded",
    old_logprobs: Literal["recorded", "scored"],
    scores_u: "Sequence[ScoresOfU]",
    prompts: int,
    scores: "Sequence[ScoresOfE]",
    first_order_e: "Sequence[AlongV]",
    normalizations: Sequence[Normalization],
    baseline: Baseline,
    units: Literal["sequence", "prompt"],
) -> dict[str, Any]:
    """Split ΔH of the step between two checkpoints.

    Args:
        out: writer of `post_mortem.parquet` (schema `post_mortem.POST_MORTEM`).
        execution: unused.
        real: artifact of real-step, of which only the summary is read.
        moved: shards of importance along the real step, at the learning rate.
        attribution: artifact of first-order-u.
        recorded: artifact of recorded-u-batch.
        old_logprobs: what the ratios of the loss are to.
        scores_u: shards of score-u-batch.
        prompts: number of prompts of U.
        scores: shards of score-e-batch.
        first_order_e: shards of first-order-e.
        normalizations: per token, per sequence, or both.
        baseline: baseline of the return-to-go in ΔH.
        units: independent units of E.

    Returns:
        Summary: number of rows, the rest of the weights' change relative to it, and how far the sampler's
        log-probabilities are from those of the policy (`sampler`, empty where they were not recorded).
    """
    learning_rate, halves = real.summary["learning_rate"], real.summary["halves"]
    along = [torch.tensor(real.summary["products"][kind], dtype=torch.float64) for kind in KINDS]
    products = by_normalization(along, *entropy_and_length(halves))
    names = ("sampling_logprobs", "old_logprobs")
    of_u = read_tokens(scores_u, "logprobs").join(read_tokens([recorded], file="recorded.safetensors", optional=names))
    sampler = sampler_of(of_u, corrected=old_logprobs == "recorded")
    batch, _ = evaluation_batch(scores, first_order_e, baseline, units)
    at_eta: AtStepSize = {"eta": learning_rate, "eta_over_lr": 1.0, "shards": moved, "path": []}
    terms = measurement.measured(batch, moved_batch(at_eta, [read_tokens([shard]) for shard in scores]), "per_decision")
    rows = []
    for normalization in normalizations:
        change = change_of(batch, terms, learning_rate, "per_decision", normalization)
        of_tokens = attribution.table("tokens.parquet")[f"share_{normalization}"].to_pylist()
        shares_K = learning_rate * torch.tensor(of_tokens, dtype=torch.float64)
        shares = Shares(shares_K, of_u.offsets_N1, prompts, sampler)
        measured = change.value, batch.standard_error(change)
        rows += [{"normalization": normalization} | row for row in rows_of(products[normalization], shares, measured)]
    out.table(to_table(rows, POST_MORTEM), "post_mortem.parquet")
    return {"rows": len(rows), "rest": real.summary["rest"], "sampler": sampler.distances() if sampler else {}}

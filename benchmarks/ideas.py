"""What else could make an error cheaper, each idea measured on one E: by itself, and whether it is built or not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Row, take_turns
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.numerics import ragged
from entropy_core.numerics.functional import Tokens
from entropy_core.numerics.uncertainty import entropy_derivative
from entropy_core.sequences.batch import BatchedSequences


def ideas(
    name: str,
    batch: BatchedSequences,
    tokens: Tokens,
    learning_rate: float,
    run: Callable[[BatchedSequences], Any],
) -> Iterator[Row]:
    """Yield a row for each idea; its ratio is how many times less SE², or seconds, it would take.

    Args:
        name: of the batch.
        batch: E.
        tokens: ℓ, h and their derivatives on E.
        learning_rate: of δH₁.
        run: the passes that are timed.
    """
    batches = [EvaluationBatch.of([lambda: tokens], None, baseline) for baseline in ("time_loo", "ridge")]
    estimates = [entropy_derivative(on_e.columns, "per_token").scaled(learning_rate) for on_e in batches]
    plain, ridge = (on_e.standard_error(estimate) for on_e, estimate in zip(batches, estimates, strict=True))
    yield Row(
        f"{name}: SE of δH₁ with a ridge baseline, which knows the prefix",
        f"{ridge:.3g}",
        f"{plain:.3g}, the mean at each position",
        (plain / ridge) ** 2,
    )
    within, total = _variances(estimates[0].influence_N, batch.prompt_ids_N)
    yield Row(
        f"{name}: SE of δH₁ if prompts were systematic over the pool, not drawn with replacement",
        f"{(within / len(batch)) ** 0.5:.3g}, from the spread within prompts",
        f"{(total / len(batch)) ** 0.5:.3g}",
        total / within,
    )
    shared, cut = _without_shared_prefix(batch)
    if not shared:
        return
    taken = take_turns({"whole": lambda: run(batch), "cut": lambda: run(cut)}, 1)
    (whole,), (least,) = taken["whole"], taken["cut"]
    yield Row(
        f"{name}: seconds if the {shared} tokens that all prompts begin with cost nothing",
        f"{least:.1f} s",
        f"{whole:.1f} s",
        whole / least,
    )


def _variances(values_N: Tensor, groups_N: Tensor) -> tuple[float, float]:
    """The variance within groups, pooled, and that of all."""
    _, index_N, count_P = groups_N.unique(return_inverse=True, return_counts=True)
    mean_P = torch.zeros(len(count_P), dtype=values_N.dtype).index_add_(0, index_N, values_N) / count_P
    within = ((values_N - mean_P[index_N]) ** 2).sum() / (len(values_N) - len(count_P))
    return float(within), float(values_N.var())


def _without_shared_prefix(batch: BatchedSequences) -> tuple[int, BatchedSequences]:
    """How many tokens all prompts begin with, and E without them; one token of each prompt stays."""
    starts_N, lengths_N = batch.prompt_offsets_N1[:-1], ragged.lengths(batch.prompt_offsets_N1)
    shared = 0
    while shared < int(lengths_N.min()) - 1 and len(batch.prompt_tokens[starts_N + shared].unique()) == 1:
        shared += 1
    kept = ragged.position_index(batch.prompt_offsets_N1) >= shared
    offsets_N1 = ragged.offsets_from_lengths(lengths_N - shared)
    return shared, replace(batch, prompt_tokens=batch.prompt_tokens[kept], prompt_offsets_N1=offsets_N1)

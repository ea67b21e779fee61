"""∂_vE[F], the first-order effect of a step v on a functional F = Σ_k f_k, from per-token columns.

    ∂_vE[F] = E[ Σ_k ḟ_k + Σ_k (R_k − b_k) ℓ̇_k ],   R_k = Σ_{j>k} f_j     (Σ_{j≥k} if f_k depends on the token a_k)

The entropy of a response has f_k = h_k, and its length has f_k = 1 and ḟ_k = 0. Neither depends on the token a_k, so
R_k starts after k. The baseline b_k depends only on the prefix and on other sequences, so it does not change the mean:
the score ℓ̇_k has mean zero given its prefix. The derivative of the entropy per token is

    ∂_vH_tok = (∂_vH_seq − H_tok·∂_vL)/L           (computed in `uncertainty`)

If the tokens were drawn from another law q than the policy π, with prefix weights W_k = Π_{j<k} π/q (W_1 = 1), and r_k
the weight of f_k (W_k, or W_{k+1} if f_k depends on a_k), the same two expectations are

    E[F]    = E_q[ Σ_k t_k ],   t_k = r_k f_k − b_k (W_{k+1} − W_k)
    ∂_vE[F] = E_q[ Σ_k r_k ḟ_k + Σ_k (Σ_{j>k} t_j − W_{k+1} b_k) ℓ̇_k ]

for any q that gives no token of π the probability 0. (If f_k depends on a_k, r_k f_k is added to the bracket.) The
second is the derivative of the first, sequence by sequence, because W_k has the derivative W_k Σ_{j<k} ℓ̇_j. With q = π
all weights are exactly 1.

Functions that take totals process one block of sequences; the other sequences enter as sums at each position, as in
`baselines`. `weighted_first_order` has the derivative of the estimator with normalised weights.
"""

from typing import NamedTuple

from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.baselines import TimeTotals, baselines
from entropy_core.numerics.choices import Baseline
from entropy_core.numerics.functional import Columns, Functional, Tokens
from entropy_core.numerics.weights import sampling_weights


class Terms(NamedTuple):
    """Of every token, float64 [K]: t_k, whose sum estimates E[F], and the factor of the score ℓ̇_k in its derivative."""

    value_K: Tensor
    of_score_K: Tensor


def terms(functional: Functional, tokens: Tokens, base_K: Tensor) -> Terms:
    """Compute t_k and Σ_{j>k} t_j − W_{k+1} b_k, which is R_k − b_k if the policy drew the tokens.

    Args:
        functional: F.
        tokens: a block of sequences.
        base_K: b_k from `baselines.baselines` or `ridge.ridge_baseline`.

    Returns:
        Both.
    """
    weights = sampling_weights(tokens)
    values_K = weights.of(functional) * functional.values(tokens)
    terms_K = values_K - base_K * (weights.after_K - weights.before_K)
    later_K = ragged.sum_after(terms_K, tokens.offsets_N1)
    of_score_K = later_K + values_K if functional.of_action else later_K
    return Terms(terms_K, of_score_K - base_K * weights.after_K)


def score_coefficients(
    functional: Functional, tokens: Tokens, baseline: Baseline, totals: TimeTotals | None = None
) -> Tensor:
    """Return the factor of the score ℓ̇_k: R_k − b_k if the policy drew the tokens; see `terms`.

    Args:
        functional: F.
        tokens: a block of sequences.
        baseline: name of the baseline, as in `baselines.baselines`.
        totals: `baselines.baseline_totals` over all sequences; None if this block is the whole batch.

    Returns:
        float64 [K].
    """
    return terms(functional, tokens, baselines(functional, tokens, baseline, totals)).of_score_K


def first_order_columns(functional: Functional, tokens: Tokens, base_K: Tensor) -> Columns:
    """Compute the per-sequence terms whose means estimate E[F] and ∂_vE[F].

    Args:
        functional: F.
        tokens: a block of sequences, with derivatives.
        base_K: b_k from `baselines.baselines` or `ridge.ridge_baseline`.

    Returns:
        Columns, float64 [N].
    """
    offsets_N1, (value_K, of_score_K) = tokens.offsets_N1, terms(functional, tokens, base_K)
    local_N = ragged.sequence_sum(sampling_weights(tokens).of(functional) * functional.derivative(tokens), offsets_N1)
    return Columns(
        total_N=ragged.sequence_sum(value_K, offsets_N1),
        derivative_N=local_N + ragged.sequence_sum(of_score_K * tokens.derivative.logprob_K, offsets_N1),
        local_N=local_N,
    )

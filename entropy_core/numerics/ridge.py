"""A baseline that looks at the prefix: a regression of what is still to come, fitted on other sequences.

    b_k = m_k + Σ_f β_f (φ_kf − μ_kf)

m and μ are the ℓ̇²-weighted means, at position k, of what is to come and of the features φ of the prefix; β is their
ridge regression, with the same weights: to first order the noise is Σ E[(R_k − b_k)² ℓ̇_k²]. For a sequence of one fold
all of them come from the sequences of the other folds (cross-fitting, Chernozhukov et al., arXiv:1608.00060), so b_k
depends on the prefix and on other sequences only, and leaves the mean of the estimate unchanged.
"""

import torch
from torch import Tensor

from entropy_core.numerics import ragged

PENALTY = 1e-2  # on the squared coefficients of features of unit variance, per unit of weight


def folds_of(units_N: Tensor, count: int = 5) -> Tensor:
    """Fold of each sequence: units are dealt out in turn, so that none is in two folds.

    Args:
        units_N: int64 [N], the unit (prompt, cluster or the sequence itself) of each sequence.
        count: number of folds; with fewer units, as many as there are units.

    Returns:
        int64 [N], from 0.
    """
    _, unit_N = units_N.unique(return_inverse=True)
    return unit_N % count


def prefix_features(logprobs_K: Tensor, entropies_K: Tensor, offsets_N1: Tensor) -> Tensor:
    """What is known of s_k before a_k is drawn: h_k, h_{k−1}, Σ_{j<k} h_j, mean surprisal so far, last surprisal.

    The surprisal is −ℓ. What lies before the first token counts as 0; the position itself enters by the means that
    `ridge_baseline` takes at each position.

    Args:
        logprobs_K: ℓ, nats, [K].
        entropies_K: h, nats, [K].
        offsets_N1: int64 [N + 1].

    Returns:
        float64 [K, 5].
    """
    position_K = ragged.position_index(offsets_N1)
    surprisals_K, entropies_K = -logprobs_K.double(), entropies_K.double()

    def last(values_K: Tensor) -> Tensor:
        return torch.where(position_K > 0, values_K.roll(1), 0.0)

    mean_surprisal_K = ragged.sum_before(surprisals_K, offsets_N1) / position_K.clamp_min(1)
    entropy_so_far_K = ragged.sum_before(entropies_K, offsets_N1)
    features = [entropies_K, last(entropies_K), entropy_so_far_K, mean_surprisal_K, last(surprisals_K)]
    return torch.stack(features, dim=1)


def ridge_baseline(
    values_K: Tensor, features_KF: Tensor, weights_K: Tensor, offsets_N1: Tensor, folds_N: Tensor
) -> Tensor:
    """b_k of every token, from the sequences of the other folds.

    Args:
        values_K: R_k or T − k, [K].
        features_KF: of `prefix_features`, [K, F].
        weights_K: ℓ̇², [K]; where those of the others at a position are all 0, their plain mean is taken.
        offsets_N1: int64 [N + 1].
        folds_N: of `folds_of`, int64 [N].

    Returns:
        float64 [K]; 0 at positions that no sequence of another fold reaches.
    """
    position_K = ragged.position_index(offsets_N1)
    fold_K = torch.repeat_interleave(folds_N, ragged.lengths(offsets_N1))
    columns_KC = torch.cat([values_K.double().unsqueeze(1), features_KF.double()], dim=1)
    weights_K, baseline_K = weights_K.double(), torch.zeros(len(values_K), dtype=torch.float64)
    for fold in folds_N.unique():
        own_K, others_K = fold_K == fold, fold_K != fold
        mean_TC = _means_by_position(columns_KC[others_K], weights_K[others_K], position_K[others_K])
        own_K &= position_K < len(mean_TC)  # sequences start together, so the positions that were seen are the first
        others_KC = columns_KC[others_K] - mean_TC[position_K[others_K]]
        slopes_F = _slopes(others_KC[:, 0], others_KC[:, 1:], weights_K[others_K], columns_KC[others_K, 1:])
        own_mean_KC = mean_TC[position_K[own_K]]
        baseline_K[own_K] = own_mean_KC[:, 0] + (columns_KC[own_K, 1:] - own_mean_KC[:, 1:]) @ slopes_F
    return baseline_K


def _means_by_position(columns_KC: Tensor, weights_K: Tensor, position_K: Tensor) -> Tensor:
    """Weighted means [T, C], plain where all weights are 0; T is one more than the last position."""
    longest = int(position_K.max()) + 1 if len(position_K) else 0

    def means(weights_K: Tensor) -> tuple[Tensor, Tensor]:
        total_T = weights_K.new_zeros(longest).index_add_(0, position_K, weights_K)
        sums_TC = columns_KC.new_zeros(longest, columns_KC.shape[1])
        sums_TC.index_add_(0, position_K, weights_K.unsqueeze(1) * columns_KC)
        return sums_TC / total_T.where(total_T > 0, 1.0).unsqueeze(1), total_T.unsqueeze(1)

    weighted_TC, total_T1 = means(weights_K)
    return weighted_TC.where(total_T1 > 0, means(torch.ones_like(weights_K))[0])


def _slopes(values_K: Tensor, features_KF: Tensor, weights_K: Tensor, uncentred_KF: Tensor) -> Tensor:
    """β [F] of centred values on centred features; 0 for a feature that does not vary."""
    share_K = weights_K / weights_K.sum() if weights_K.any() else weights_K
    variance_F = share_K @ features_KF**2
    # what is left of a constant after its mean was taken away is rounding, which scaling would blow up
    varies_F = variance_F > 1e-18 * (share_K @ uncentred_KF**2)
    scale_F = variance_F.where(varies_F, 1.0).sqrt()
    scaled_KF = features_KF * (varies_F / scale_F)
    weighted_KF = share_K.unsqueeze(1) * scaled_KF
    gram_FF = weighted_KF.T @ scaled_KF + PENALTY * torch.eye(len(scale_F), dtype=torch.float64)
    return torch.linalg.solve(gram_FF, weighted_KF.T @ values_K) / scale_F

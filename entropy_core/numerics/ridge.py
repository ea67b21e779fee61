"""A baseline that depends on the prefix: a ridge regression of the return-to-go R_k, fitted on other sequences.

    b_k = m_k + Σ_f β_f (φ_kf − μ_kf)

m_k and μ_k are the ℓ̇²-weighted means of R and of the prefix features φ at position k, and β are the slopes of a ridge
regression with the same weights, because the variance of the estimate is Σ E[(R_k − b_k)² ℓ̇_k²] to first order. For
the sequences of one fold, m, μ and β are computed on the other folds (cross-fitting, Chernozhukov et al.,
arXiv:1608.00060). So b_k depends only on the prefix and on other sequences, and the estimate keeps its mean.

The fit reads the sequences twice, block by block: once for the means, and once for the slopes of the centred values.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_core.numerics import ragged

PENALTY = 1e-2  # penalty on squared slopes of features scaled to unit variance, per unit of weight


def folds_of(units_N: Tensor, count: int = 5) -> Tensor:
    """Assign a fold to each sequence; units are dealt out in turn, so no unit is in two folds.

    Args:
        units_N: int64 [N], the unit (prompt, cluster or the sequence itself) of each sequence.
        count: number of folds; reduced to the number of units if there are fewer.

    Returns:
        int64 [N], from 0.
    """
    _, unit_N = units_N.unique(return_inverse=True)
    return unit_N % count


def prefix_features(logprobs_K: Tensor, entropies_K: Tensor, offsets_N1: Tensor) -> Tensor:
    """Compute features known before token k is drawn: h_k, h_{k−1}, Σ_{j<k} h_j, mean surprisal so far, last surprisal.

    The surprisal is −ℓ. Features that refer to earlier tokens are 0 at the first token. The position itself is not a
    feature, because `ridge_baseline` uses separate means at each position.

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


class RidgeBlock(NamedTuple):
    """A block of sequences: returns R_k [K], `prefix_features` [K, F], weights ℓ̇² [K], offsets, and folds [N]."""

    values_K: Tensor
    features_KF: Tensor
    weights_K: Tensor
    offsets_N1: Tensor
    folds_N: Tensor

    @property
    def columns_KC(self) -> Tensor:
        """Value and features of each token, float64 [K, 1 + F]."""
        return torch.cat([self.values_K.double().unsqueeze(1), self.features_KF.double()], dim=1)

    @property
    def fold_K(self) -> Tensor:
        """Fold of each token, int64 [K]."""
        return ragged.of_tokens(self.folds_N, self.offsets_N1)


class Fit(NamedTuple):
    """Fit on the other folds: means of the value and the features at each position [T, 1 + F], and slopes [F]."""

    mean_TC: Tensor
    slopes_F: Tensor


def fit(blocks: Callable[[], Iterable[RidgeBlock]], folds: int) -> list[Fit]:
    """Fit the regression for each fold, on the sequences of the other folds.

    Args:
        blocks: returns all sequences, block by block; called twice.
        folds: number of folds.

    Returns:
        One fit per fold. If all weights of the other folds are 0 at a position, their plain mean is used; positions
        that the other folds do not reach are omitted.
    """
    sums = None
    for block in blocks():
        of_block = _sums_by_position(block, folds)
        sums = of_block if sums is None else ragged.padded_sum(sums, of_block)
    assert sums is not None
    means = [_means(sums[:, torch.arange(folds) != fold].sum(1)) for fold in range(folds)]
    moments = [_Moments.none(block.features_KF.shape[1])] * folds
    for block in blocks():
        moments = [found.plus(_moments(block, fold, means[fold])) for fold, found in enumerate(moments)]
    return [Fit(mean_TC, _slopes(found)) for mean_TC, found in zip(means, moments, strict=True)]


def ridge_baseline(block: RidgeBlock, fits: list[Fit]) -> Tensor:
    """Compute b_k of every token from the fit on the other folds.

    Args:
        block: a block of sequences.
        fits: `fit` on all sequences.

    Returns:
        float64 [K]; 0 at positions that no sequence of another fold reaches.
    """
    position_K, fold_K, columns_KC = ragged.position_index(block.offsets_N1), block.fold_K, block.columns_KC
    baseline_K = torch.zeros(len(columns_KC), dtype=torch.float64)
    for fold, (mean_TC, slopes_F) in enumerate(fits):
        own_K = (fold_K == fold) & (position_K < len(mean_TC))
        mean_KC = mean_TC[position_K[own_K]]
        baseline_K[own_K] = mean_KC[:, 0] + (columns_KC[own_K, 1:] - mean_KC[:, 1:]) @ slopes_F
    return baseline_K


def _sums_by_position(block: RidgeBlock, folds: int) -> Tensor:
    """Sum 1, the value and the features by position and fold, plain and weighted: float64 [T, folds, 2, 1 + C]."""
    columns_KC = torch.nn.functional.pad(block.columns_KC, (1, 0), value=1.0)
    both_K2C = torch.stack([columns_KC, block.weights_K.double().unsqueeze(1) * columns_KC], dim=1)
    longest = int(ragged.lengths(block.offsets_N1).max())
    index_K = ragged.position_index(block.offsets_N1) * folds + block.fold_K
    sums = both_K2C.new_zeros(longest * folds, *both_K2C.shape[1:]).index_add_(0, index_K, both_K2C)
    return sums.view(longest, folds, *both_K2C.shape[1:])


def _means(sums_T2C: Tensor) -> Tensor:
    """Return weighted means [T, C], plain ones if all weights are 0, for the first T positions, which are reached."""
    reached_T2C = sums_T2C[: int((sums_T2C[:, 0, 0] > 0).sum())]
    total_T21 = reached_T2C[:, :, :1]
    plain_TC, weighted_TC = (reached_T2C[:, :, 1:] / total_T21.where(total_T21 > 0, 1.0)).unbind(1)
    return weighted_TC.where(total_T21[:, 1] > 0, plain_TC)


class _Moments(NamedTuple):
    """Weighted sums of 1, uncentred φ², and centred φφᵀ and φ·value over the other folds."""

    weight: Tensor
    squares_F: Tensor
    gram_FF: Tensor
    product_F: Tensor

    @classmethod
    def none(cls, features: int) -> "_Moments":
        return cls(*(torch.zeros([features] * rank, dtype=torch.float64) for rank in (0, 1, 2, 1)))

    def plus(self, other: "_Moments") -> "_Moments":
        return _Moments(*map(torch.add, self, other))


def _moments(block: RidgeBlock, fold: int, mean_TC: Tensor) -> _Moments:
    others_K = block.fold_K != fold
    columns_KC, weights_K = block.columns_KC[others_K], block.weights_K[others_K].double()
    centred_KC = columns_KC - mean_TC[ragged.position_index(block.offsets_N1)[others_K]]
    features_KF = centred_KC[:, 1:]
    weighted_KF = weights_K.unsqueeze(1) * features_KF
    squares_F = weights_K @ columns_KC[:, 1:] ** 2
    return _Moments(weights_K.sum(), squares_F, weighted_KF.T @ features_KF, weighted_KF.T @ centred_KC[:, 0])


def _slopes(of: _Moments) -> Tensor:
    """Return the slopes β [F] of centred values on centred features; 0 for a feature that does not vary."""
    weight = of.weight.where(of.weight > 0, 1.0)
    variance_F = of.gram_FF.diagonal() / weight
    # a constant minus its mean is rounding error, which the scaling would amplify
    varies_F = variance_F > 1e-18 * (of.squares_F / weight)
    inverse_F = varies_F / variance_F.where(varies_F, 1.0).sqrt()
    gram_FF = inverse_F.unsqueeze(1) * (of.gram_FF / weight) * inverse_F
    gram_FF += PENALTY * torch.eye(len(inverse_F), dtype=torch.float64)
    return torch.linalg.solve(gram_FF, inverse_F * (of.product_F / weight)) * inverse_F

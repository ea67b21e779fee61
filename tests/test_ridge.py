"""The baseline from the prefix: its regression against a joint least squares, its mean against enumeration."""

from itertools import combinations_with_replacement, pairwise, product
from math import factorial, prod

import numpy as np
import pytest
import torch
from conftest import World, gpt2, policy_of, random_direction
from test_enumeration import EXACT, Everything, enumerate_world
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.baselines import returns_to_go, time_loo_baseline
from entropy_core.numerics.functional import ENTROPY, LENGTH, Tokens
from entropy_core.numerics.ridge import PENALTY, RidgeBlock, fit, folds_of, prefix_features, ridge_baseline

LENGTHS = [3, 1, 4, 2, 4, 5, 3]
OFFSETS = ragged.offsets_from_lengths(torch.tensor(LENGTHS))
FOLDS = torch.tensor([0, 1, 2, 0, 1, 2, 2])
K = sum(LENGTHS)


def made_up(features: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    values_K, features_KF, weights_K = torch.randn(K), torch.randn(K, features), torch.rand(K) ** 3
    return values_K.double(), features_KF.double(), weights_K.double()


def regressed(*columns: Tensor) -> Tensor:
    """The baseline of sequences that are all there are."""
    block = RidgeBlock(*columns)
    return ridge_baseline(block, fit(lambda: [block], int(block.folds_N.max()) + 1))


def tokens_of_fold(fold: int) -> Tensor:
    return torch.repeat_interleave(fold == FOLDS, torch.tensor(LENGTHS))


# --- folds and features ----------------------------------------------------------------------------------------------


def test_units_are_dealt_out_whole():
    units_N = torch.tensor([70, 3, 3, 12, 70, 5, 8, 9, 12, 100, 3])
    folds_N = folds_of(units_N)
    for unit in units_N.unique():
        assert len(folds_N[units_N == unit].unique()) == 1
    assert folds_N.unique().tolist() == [0, 1, 2, 3, 4]
    _, sizes = torch.stack([folds_N, units_N]).unique(dim=1)[0].unique(return_counts=True)
    assert sizes.tolist() == [2, 2, 1, 1, 1]  # 7 units, as even as it goes
    assert folds_of(torch.tensor([4, 4, 9])).tolist() == [0, 0, 1]
    assert folds_of(torch.arange(6), count=2).tolist() == [0, 1, 0, 1, 0, 1]


def test_features_by_hand():
    logprobs_K = torch.tensor([-1.0, -3.0, -2.0, -0.5, -4.0])
    entropies_K = torch.tensor([1.0, 2.0, 4.0, 7.0, 3.0])
    expected = [
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [2.0, 1.0, 1.0, 1.0, 1.0],
        [4.0, 2.0, 3.0, 2.0, 3.0],
        [7.0, 0.0, 0.0, 0.0, 0.0],
        [3.0, 7.0, 7.0, 0.5, 0.5],
    ]
    found_KF = prefix_features(logprobs_K, entropies_K, torch.tensor([0, 3, 5]))
    torch.testing.assert_close(found_KF, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=1e-15)


def test_features_know_the_prefix_only():
    logprobs_K, entropies_K = -torch.rand(2, K).double()
    before_KF = prefix_features(logprobs_K, entropies_K, OFFSETS)
    for k in range(int(OFFSETS[2]), int(OFFSETS[3])):  # step k of the third sequence: ℓ from there on, h after it
        later_K, changed_K = logprobs_K.clone(), entropies_K.clone()
        later_K[k : OFFSETS[3]] += 5.0
        changed_K[k + 1 : OFFSETS[3]] += 5.0
        after_KF = prefix_features(later_K, changed_K, OFFSETS)
        torch.testing.assert_close(after_KF[: k + 1], before_KF[: k + 1], rtol=0, atol=1e-13)
        torch.testing.assert_close(after_KF[OFFSETS[3] :], before_KF[OFFSETS[3] :], rtol=0, atol=1e-13)


# --- the regression --------------------------------------------------------------------------------------------------


def test_the_baseline_is_that_of_a_joint_least_squares():
    """One column for each position and one for each feature; only the features are penalised."""
    values_K, features_KF, weights_K = made_up()
    position = ragged.position_index(OFFSETS).numpy()
    found_K = regressed(values_K, features_KF, weights_K, OFFSETS, FOLDS)
    for fold in range(3):
        own = tokens_of_fold(fold).numpy()
        y, X, w = (column[~own] for column in (values_K.numpy(), features_KF.numpy(), weights_K.numpy()))
        longest = position[~own].max() + 1
        dummies = np.eye(longest)[position[~own]]
        root = np.sqrt(w / w.sum())
        # standard deviation of each feature about its means by position: what a weighted regression leaves of it
        means = np.linalg.lstsq(root[:, None] * dummies, root[:, None] * X, rcond=None)[0]
        scale = np.sqrt(((root[:, None] * (X - dummies @ means)) ** 2).sum(0))
        design = np.vstack(
            [
                root[:, None] * np.hstack([dummies, X]),
                np.hstack([np.zeros((3, longest)), np.sqrt(PENALTY) * np.diag(scale)]),
            ]
        )
        solution = np.linalg.lstsq(design, np.concatenate([root * y, np.zeros(3)]), rcond=None)[0]
        reached = own & (position < longest)
        expected = np.hstack([np.eye(longest)[position[reached]], features_KF.numpy()[reached]]) @ solution
        np.testing.assert_allclose(found_K.numpy()[reached], expected, rtol=1e-10, atol=1e-12)
        assert (found_K.numpy()[own & (position >= longest)] == 0).all()
    assert (position[tokens_of_fold(2).numpy()] == 4).any()  # the longest sequence goes where no other does


def test_the_baseline_is_blind_to_its_own_fold():
    values_K, features_KF, weights_K = made_up()
    before_K = regressed(values_K, features_KF, weights_K, OFFSETS, FOLDS)
    for fold in range(3):
        own_K = tokens_of_fold(fold)
        changed_values_K, changed_weights_K = values_K.clone(), weights_K.clone()
        changed_values_K[own_K] += 100 * torch.randn(int(own_K.sum())).double()
        changed_weights_K[own_K] = torch.rand(int(own_K.sum())).double()
        after_K = regressed(changed_values_K, features_KF, changed_weights_K, OFFSETS, FOLDS)
        assert torch.equal(after_K[own_K], before_K[own_K])
        reached_K = before_K != 0
        assert not torch.isclose(after_K[~own_K & reached_K], before_K[~own_K & reached_K]).any()


def test_blocks_of_sequences_have_the_baseline_of_all_of_them():
    values_K, features_KF, weights_K = made_up()
    expected_K = regressed(values_K, features_KF, weights_K, OFFSETS, FOLDS)
    ends = [0, 1, 3, 4, 7]
    blocks = [
        RidgeBlock(
            *(x_K[OFFSETS[start] : OFFSETS[stop]] for x_K in (values_K, features_KF, weights_K)),
            OFFSETS[start : stop + 1] - OFFSETS[start],
            FOLDS[start:stop],
        )
        for start, stop in pairwise(ends)
    ]
    fits = fit(lambda: blocks, 3)
    found_K = torch.cat([ridge_baseline(block, fits) for block in blocks])
    torch.testing.assert_close(found_K, expected_K, rtol=1e-12, atol=1e-12)


def test_neither_the_scale_of_the_weights_nor_of_a_feature_matters():
    values_K, features_KF, weights_K = made_up()
    found_K = regressed(values_K, features_KF, weights_K, OFFSETS, FOLDS)
    scaled_K = regressed(3 * values_K, features_KF * torch.tensor([1e6, 1.0, 1e-6]), 1e-20 * weights_K, OFFSETS, FOLDS)
    torch.testing.assert_close(scaled_K, 3 * found_K, rtol=1e-9, atol=1e-12)


def test_weights_of_zero_leave_the_plain_mean():
    values_K, features_KF, _ = made_up()
    found_K = regressed(values_K, features_KF, torch.zeros(K), OFFSETS, torch.arange(len(LENGTHS)))
    torch.testing.assert_close(found_K, time_loo_baseline(values_K, OFFSETS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3e7])
def test_constant_features_leave_the_weighted_mean(constant: float):
    values_K, _, weights_K = made_up()
    features_KF = torch.full((K, 2), constant, dtype=torch.float64)
    found_K = regressed(values_K, features_KF, weights_K, OFFSETS, torch.arange(len(LENGTHS)))
    expected_K = time_loo_baseline(values_K, OFFSETS, weights_K)
    torch.testing.assert_close(found_K, expected_K, rtol=1e-9, atol=1e-9)


def test_without_other_folds_there_is_no_baseline():
    values_K, features_KF, weights_K = made_up()
    assert (regressed(values_K, features_KF, weights_K, OFFSETS, torch.zeros_like(FOLDS)) == 0).all()


# --- what it does to the estimate ------------------------------------------------------------------------------------


def small_world(vocabulary: int) -> Everything:
    """Two prompts, and so few sequences that every batch of three can be gone through."""
    world = World(policy_of(gpt2(vocabulary)), [[1], [0, 1, 1]], temperature=0.8, max_new_tokens=2)
    return enumerate_world(world, random_direction(world.policy))


@pytest.fixture(scope="module")
def few() -> Everything:
    return small_world(vocabulary=3)


@pytest.fixture(scope="module")
def fewer() -> Everything:
    return small_world(vocabulary=2)


def estimates(batch: Everything, chosen: tuple[int, ...], folds_N: Tensor) -> tuple[float, float]:
    """Mean x and y of a batch with the ridge baseline."""
    pick_K, offsets_N1 = batch.tokens_of(torch.tensor(chosen))
    logprobs_K, entropies_K, dlogprobs_K, dentropies_K = (column_K[pick_K] for column_K in batch.tokens)
    features_KF = prefix_features(logprobs_K, entropies_K, offsets_N1)
    weights_K = dlogprobs_K**2
    of_score = []
    for functional in (ENTROPY, LENGTH):
        values_K = returns_to_go(functional, Tokens(logprobs_K, entropies_K, offsets_N1))
        left_K = values_K - regressed(values_K, features_KF, weights_K, offsets_N1, folds_N)
        of_score.append(float((left_K * dlogprobs_K).sum()) / len(chosen))
    return float(dentropies_K.sum()) / len(chosen) + of_score[0], of_score[1]


def test_the_ridge_baseline_is_unbiased_over_every_batch(few: Everything):
    """Every sequence a fold of its own: the order of a batch does not matter."""
    assert len(few.sequences) == 14
    X = Y = total = 0.0
    for chosen in combinations_with_replacement(range(14), 3):
        orders = factorial(3) // prod(factorial(chosen.count(i)) for i in set(chosen))
        probability = orders * float(few.probability_N[list(chosen)].prod())
        x, y = estimates(few, chosen, folds_of(torch.arange(3)))
        X, Y, total = X + probability * x, Y + probability * y, total + probability
    assert total == pytest.approx(1.0, abs=1e-12)
    assert pytest.approx(few.world.derivative(lambda exact: exact.H_seq, few.v), abs=EXACT) == X
    assert pytest.approx(few.world.derivative(lambda exact: exact.L, few.v), abs=EXACT) == Y


def test_the_ridge_baseline_is_unbiased_with_two_sequences_in_a_fold(fewer: Everything):
    X = Y = 0.0
    for chosen in product(range(len(fewer.sequences)), repeat=3):
        probability = float(fewer.probability_N[list(chosen)].prod())
        x, y = estimates(fewer, chosen, torch.tensor([0, 1, 1]))
        X, Y = X + probability * x, Y + probability * y
    assert pytest.approx(fewer.world.derivative(lambda exact: exact.H_seq, fewer.v), abs=EXACT) == X
    assert pytest.approx(fewer.world.derivative(lambda exact: exact.L, fewer.v), abs=EXACT) == Y


def test_a_fit_that_includes_the_own_sequence_is_biased(fewer: Everything):
    """So that the two tests above can fail: copies of every sequence, in another fold, tell what it does."""
    X = 0.0
    for chosen in product(range(len(fewer.sequences)), repeat=3):
        x, _ = estimates(fewer, chosen + chosen, torch.tensor([0, 0, 0, 1, 1, 1]))
        X += float(fewer.probability_N[list(chosen)].prod()) * x
    assert abs(fewer.world.derivative(lambda exact: exact.H_seq, fewer.v) - X) > 1e-4


def test_less_noise_where_the_return_depends_on_the_prefix():
    """Sequences of their own level of entropy: what has been tells what will be. Score independent of both."""
    N, T = 400, 12
    offsets_N1 = ragged.offsets_from_lengths(torch.full((N,), T))
    level_N1 = torch.randn(N, 1, dtype=torch.float64)
    entropies_K = (2 + level_N1 + 0.5 * torch.randn(N, T, dtype=torch.float64)).flatten()
    score_K = torch.randn(N * T, dtype=torch.float64)
    returns_K = returns_to_go(ENTROPY, Tokens(entropies_K, entropies_K, offsets_N1))
    features_KF = prefix_features(torch.randn(N * T), entropies_K, offsets_N1)
    ridge_K = regressed(returns_K, features_KF, score_K**2, offsets_N1, folds_of(torch.arange(N)))

    def noise(baseline_K: Tensor) -> float:
        return float(ragged.sequence_sum((returns_K - baseline_K) * score_K, offsets_N1).std())

    assert noise(ridge_K) < 0.7 * noise(time_loo_baseline(returns_K, offsets_N1))
    # and hardly more than the mean where there is nothing to be seen
    blind_KF = torch.randn(N * T, 5, dtype=torch.float64)
    nothing_K = regressed(returns_K, blind_KF, score_K**2, offsets_N1, folds_of(torch.arange(N)))
    assert noise(nothing_K) < 1.02 * noise(time_loo_baseline(returns_K, offsets_N1, score_K**2))

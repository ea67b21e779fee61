"""Every response of a tiny policy, with its probability: what an estimator gives on average is a finite sum.

Σ_t π(t)·estimate(t) must be the exact value to 1e-10, without any sampling. The exact values come from `World.exact`:
Shannon's entropy of the law of whole responses, differentiated in reverse mode; the estimators go the package's way,
through padded micro-batches and forward mode.
"""

from itertools import pairwise

import pytest
import torch
from conftest import World, gpt2, llama, policy_of, random_direction
from enumeration import (
    Direction,
    Everything,
    by_position,
    enumerate_world,
    every_batch,
    no_baseline,
    per_decision,
    processor_of,
    taken,
    weighted_per_decision,
)
from torch import Tensor

from entropy_core.numerics import ragged, uncertainty
from entropy_core.numerics.baselines import time_loo_baseline
from entropy_core.numerics.choices import Baseline, Normalization
from entropy_core.numerics.first_order import score_coefficients
from entropy_core.numerics.functional import ENTROPY, FUNCTIONALS, LENGTH, Columns, Functional
from entropy_core.numerics.weighted_first_order import weighted_columns
from entropy_core.numerics.weights import PrefixWeights, prefix_weights
from entropy_core.policy.model import Coefficients

EXACT = 1e-10
ETAS = [-0.5, 0.02, 0.3, 2.0]


@pytest.fixture(scope="module")
def everything(world: World, v: Direction) -> Everything:
    return enumerate_world(world, v)


# --- at θ ------------------------------------------------------------------------------------------------------------


def test_the_law_sums_to_one_and_is_what_the_policy_scores(everything: Everything):
    assert everything.mean(torch.ones(len(everything.sequences)).double()) == pytest.approx(1.0, abs=1e-13)
    assert len(everything.sequences) == 3 * (1 + 3 + 9 + 27 * 4)
    logprob_N = ragged.sequence_sum(everything.tokens.logprobs_K, everything.offsets_N1)
    torch.testing.assert_close(logprob_N.exp() / 3, everything.probability_N, rtol=1e-10, atol=0)


def test_step_entropies_add_up_to_the_entropy_of_the_response(everything: Everything):
    columns, exact = everything.columns("none"), everything.world.exact()
    assert everything.mean(columns[ENTROPY].total_N) == pytest.approx(exact.H_seq.item(), abs=EXACT)
    assert everything.mean(columns[LENGTH].total_N) == pytest.approx(exact.L.item(), abs=EXACT)
    assert torch.equal(columns[LENGTH].total_N, everything.sequences.lengths_N.double())


def test_first_order_is_exact_on_average(everything: Everything):
    columns, world, v = everything.columns("none"), everything.world, everything.v
    X, Y = everything.mean(columns[ENTROPY].derivative_N), everything.mean(columns[LENGTH].derivative_N)
    assert pytest.approx(world.derivative(lambda exact: exact.H_seq, v), abs=EXACT) == X
    assert pytest.approx(world.derivative(lambda exact: exact.L, v), abs=EXACT) == Y
    H, L = (
        everything.mean(columns[ENTROPY].total_N) / everything.mean(columns[LENGTH].total_N),
        everything.mean(columns[LENGTH].total_N),
    )
    per_token = (X - H * Y) / L
    assert per_token == pytest.approx(world.derivative(lambda exact: exact.H_tok, v), abs=EXACT)
    # every part of it matters here
    future = X - everything.mean(columns[ENTROPY].local_N)
    assert min(abs(future), abs(X - future), abs(H * Y)) > 0.02


def test_any_baseline_of_prefix_and_position_leaves_the_mean(everything: Everything):
    base = by_position(everything)
    for values_K in base.values():
        score_N = ragged.sequence_sum(values_K * everything.tokens.dlogprobs_K, everything.offsets_N1)
        assert abs(everything.mean(score_N)) < EXACT
        assert score_N.abs().max() > 0.1


def test_the_estimate_of_a_whole_batch_is_its_ratio(everything: Everything):
    # equal weights: 3·121 sequences as if each had been drawn once
    columns = everything.columns("none")
    (S_N, x_N, _), (T_N, y_N, _) = columns[ENTROPY], columns[LENGTH]
    x, y, S, T = (float(c_N.mean()) for c_N in (x_N, y_N, S_N, T_N))
    assert uncertainty.entropy_derivative(columns, "per_sequence").value == pytest.approx(x, rel=1e-14)
    per_token = uncertainty.entropy_derivative(columns, "per_token").value
    assert per_token == pytest.approx(x / T - S * y / T**2, rel=1e-12)
    assert uncertainty.entropy(S_N, T_N, "per_token").value == pytest.approx(S / T, rel=1e-14)
    assert uncertainty.entropy(S_N, T_N, "per_sequence").value == pytest.approx(S, rel=1e-14)


def test_a_policy_with_float32_norms_agrees_to_float32():
    world = World(policy_of(llama()), [[1], [2, 0], [3, 1, 0]], temperature=1.3, max_new_tokens=3)
    everything = enumerate_world(world, random_direction(world.policy))
    columns, exact = everything.columns("none"), world.exact()
    assert everything.mean(columns[ENTROPY].total_N) == pytest.approx(exact.H_seq.item(), abs=2e-6)
    assert everything.mean(columns[LENGTH].total_N) == pytest.approx(exact.L.item(), abs=2e-6)
    for mean, of in ((columns[ENTROPY].derivative_N, lambda e: e.H_seq), (columns[LENGTH].derivative_N, lambda e: e.L)):
        assert everything.mean(mean) == pytest.approx(world.derivative(of, everything.v), abs=2e-6)
    moved = per_decision(everything.at(0.5), by_position(everything))
    there = world.exact_at(everything.v, 0.5)
    assert everything.mean(moved.S_N) == pytest.approx(there.H_seq.item(), abs=2e-6)
    assert everything.mean(moved.T_N) == pytest.approx(there.L.item(), abs=2e-6)


# --- the leave-one-out baseline --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few() -> Everything:
    """Two prompts and 14 sequences, so that every batch of three can be gone through."""
    world = World(policy_of(gpt2(vocabulary=3)), [[1], [0, 2, 1]], temperature=0.8, max_new_tokens=2)
    return enumerate_world(world, random_direction(world.policy))


@pytest.mark.parametrize(("baseline", "size"), [("time_loo", 2), ("time_loo", 3), ("time_loo_weighted", 3)])
def test_leaving_one_out_is_unbiased_over_every_batch(few: Everything, baseline: Baseline, size: int):
    """Σ over all batches of their probability times the batch's mean term."""
    X = Y = total = 0.0
    for chosen_N, probability in every_batch(few, size):
        columns = few.subset(chosen_N).columns(baseline)
        X += probability * float(columns[ENTROPY].derivative_N.mean())
        Y += probability * float(columns[LENGTH].derivative_N.mean())
        total += probability
    assert total == pytest.approx(1.0, abs=1e-12)
    assert pytest.approx(few.world.derivative(lambda exact: exact.H_seq, few.v), abs=EXACT) == X
    assert pytest.approx(few.world.derivative(lambda exact: exact.L, few.v), abs=EXACT) == Y


def test_time_loo_is_the_mean_of_the_others_alive_and_blind_to_its_own_sequence():
    lists = [[1.0, 2.0, 3.0], [5.0], [7.0, 11.0, 13.0, 17.0], [19.0, 23.0]]
    offsets_N1 = ragged.offsets_from_lengths(torch.tensor([len(values) for values in lists]))
    values_K = torch.tensor([x for values in lists for x in values])
    expected = []
    for i, values in enumerate(lists):
        for k in range(len(values)):
            others = [other[k] for j, other in enumerate(lists) if j != i and k < len(other)]
            expected.append(sum(others) / len(others) if others else 0.0)
    baseline_K = time_loo_baseline(values_K, offsets_N1)
    torch.testing.assert_close(baseline_K, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    for i in range(len(lists)):
        mine = slice(int(offsets_N1[i]), int(offsets_N1[i + 1]))
        changed_K = values_K.clone()
        changed_K[mine] += 100 * torch.randn(len(lists[i]))
        torch.testing.assert_close(time_loo_baseline(changed_K, offsets_N1)[mine], baseline_K[mine], rtol=0, atol=1e-9)


def test_weighted_time_loo_is_the_weighted_mean_of_the_others_and_blind_to_its_own_sequence():
    lists = [[1.0, 2.0, 3.0], [5.0], [7.0, 11.0, 13.0, 17.0], [19.0, 23.0], [29.0, 31.0, 37.0]]
    weights = [[0.5, 0.0, 2.0], [0.1], [0.0, 3.0, 0.0, 1.0], [0.7, 1.1], [1e-3, 5.0, 0.0]]
    offsets_N1 = ragged.offsets_from_lengths(torch.tensor([len(values) for values in lists]))
    values_K, weights_K = (
        torch.tensor([x for row in rows for x in row], dtype=torch.float64) for rows in (lists, weights)
    )
    expected = []
    for i, values in enumerate(lists):
        for k in range(len(values)):
            others = [j for j, other in enumerate(lists) if j != i and k < len(other)]
            weight = sum(weights[j][k] for j in others)
            if weight:
                expected.append(sum(weights[j][k] * lists[j][k] for j in others) / weight)
            else:  # no weight: the plain mean, and nothing where nobody is left
                expected.append(sum(lists[j][k] for j in others) / max(len(others), 1))
    baseline_K = time_loo_baseline(values_K, offsets_N1, weights_K)
    torch.testing.assert_close(baseline_K, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    for i in range(len(lists)):
        mine = slice(int(offsets_N1[i]), int(offsets_N1[i + 1]))
        changed_K, changed_weights_K = values_K.clone(), weights_K.clone()
        changed_K[mine] *= 3.0
        changed_weights_K[mine] = 10 * torch.rand(len(lists[i])).double()
        found_K = time_loo_baseline(changed_K, offsets_N1, changed_weights_K)
        torch.testing.assert_close(found_K[mine], baseline_K[mine], rtol=1e-9, atol=0)


def test_leaving_one_out_leaves_less_noise(everything: Everything):
    batch = everything.drawn(400)
    none, plain, weighted = (
        uncertainty.standard_error(uncertainty.entropy_derivative(batch.columns(b), "per_sequence").influence_N)
        for b in ("none", "time_loo", "time_loo_weighted")
    )
    assert plain < 0.95 * none and weighted < 0.95 * none


def test_the_weighted_baseline_needs_the_weights(everything: Everything):
    with pytest.raises(ValueError, match="needs the derivatives"):
        score_coefficients(ENTROPY, everything.block._replace(along=None), "time_loo_weighted")


# --- at θ + ηv -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("with_baseline", [False, True])
def test_per_decision_is_exact_on_average_at_every_step_size(everything: Everything, eta: float, with_baseline: bool):
    moved = per_decision(everything.at(eta), by_position(everything) if with_baseline else no_baseline(everything))
    exact = everything.world.exact_at(everything.v, eta)
    assert everything.mean(moved.S_N) == pytest.approx(exact.H_seq.item(), abs=EXACT)
    assert everything.mean(moved.T_N) == pytest.approx(exact.L.item(), abs=EXACT)
    assert abs(exact.H_seq.item() - everything.world.exact().H_seq.item()) > 1e-3


def test_per_decision_with_leave_one_out_baselines_is_exact_over_every_pair(few: Everything):
    at_eta = few.at(0.7)
    exact = few.world.exact_at(few.v, 0.7)
    S = T = 0.0
    for i in range(len(few.sequences)):
        for j in range(len(few.sequences)):
            chosen_N = torch.tensor([i, j])
            of_pair = taken(*at_eta, chosen_N, *few.tokens_of(chosen_N))
            moved = per_decision(of_pair, few.subset(chosen_N).base("time_loo"))
            probability = float(few.probability_N[i] * few.probability_N[j])
            S += probability * float(moved.S_N.mean())
            T += probability * float(moved.T_N.mean())
    assert pytest.approx(exact.H_seq.item(), abs=EXACT) == S
    assert pytest.approx(exact.L.item(), abs=EXACT) == T


@pytest.mark.parametrize("eta", ETAS)
def test_whole_sequence_weights_are_the_ratio_of_the_laws(everything: Everything, eta: float):
    moved, weights = everything.at(eta)
    there = everything.world.exact_at(everything.v, eta)
    w_N = weights.sequence_N
    assert everything.mean(w_N) == pytest.approx(1.0, abs=EXACT)
    moved_S_N = ragged.sequence_sum(moved.entropies_K, everything.offsets_N1)
    assert everything.mean(w_N * moved_S_N) == pytest.approx(there.H_seq.item(), abs=EXACT)
    assert everything.mean(w_N * everything.columns("none")[LENGTH].total_N) == pytest.approx(there.L.item(), abs=EXACT)


def test_nothing_moves_at_eta_zero(everything: Everything):
    batch = everything.drawn(50)
    logprobs_K = batch.tokens.logprobs_K
    weights = prefix_weights(logprobs_K, logprobs_K, batch.offsets_N1)
    columns, unmoved = batch.columns("time_loo"), (batch.block, weights)
    moved, normalised = per_decision(unmoved, batch.base("time_loo")), weighted_per_decision(unmoved)
    torch.testing.assert_close(normalised.T_N, columns[LENGTH].total_N, rtol=1e-12, atol=0)
    torch.testing.assert_close(normalised.S_N, columns[ENTROPY].total_N, rtol=1e-12, atol=0)
    for normalization in ("per_token", "per_sequence"):
        at_theta = uncertainty.entropy(columns[ENTROPY].total_N, columns[LENGTH].total_N, normalization)
        change = uncertainty.entropy(*moved, normalization).minus(at_theta)
        assert change.value == 0.0 and (change.influence_N == 0).all()
    again, of_again = batch.at(0.0)  # by another forward pass, so to rounding
    torch.testing.assert_close(tuple(of_again), tuple(weights), rtol=1e-12, atol=0)
    torch.testing.assert_close(again.entropies_K, batch.tokens.entropies_K, rtol=1e-12, atol=1e-14)


def weighted_by_hand(batch: Everything, weights: PrefixWeights, moved_K: Tensor) -> tuple[float, float]:
    """Σ_k A_k/W_k for entropy and length, by loops: a finished sequence keeps its weight, and has no entropy left."""
    S = T = 0.0
    start, (before, _, whole) = batch.offsets_N1.tolist(), (w.tolist() for w in weights)
    for k in range(4):
        alive = [first + k for first, stop in pairwise(start) if first + k < stop]
        finished = [w for w, (first, stop) in zip(whole, pairwise(start), strict=True) if first + k >= stop]
        weight = sum(before[j] for j in alive) + sum(finished)
        S += sum(before[j] * moved_K[j].item() for j in alive) / weight
        T += sum(before[j] for j in alive) / weight
    return S, T


@pytest.mark.parametrize("eta", ETAS)
def test_weights_normalised_by_position(everything: Everything, eta: float):
    batch = everything.drawn(4000)
    (moved, weights), exact = batch.at(eta), everything.world.exact_at(everything.v, eta)
    S_N, T_N = weighted_per_decision((moved, weights))
    S, T = weighted_by_hand(batch, weights, moved.entropies_K)
    assert S_N.mean().item() == pytest.approx(S, rel=1e-10)
    assert T_N.mean().item() == pytest.approx(T, rel=1e-10)
    # consistent: with the bias of order 1/N far below the standard error
    found = {
        "H_seq": uncertainty.entropy(S_N, T_N, "per_sequence"),
        "L": uncertainty.mean(T_N),
        "H_tok": uncertainty.entropy(S_N, T_N, "per_token"),
    }
    for name, estimate in found.items():
        error = estimate.value - getattr(exact, name).item()
        assert abs(error) < 4 * uncertainty.standard_error(estimate.influence_N), name


def weighted(batch: Everything) -> dict[Functional, Columns]:
    return {functional: weighted_columns(functional, batch.block) for functional in FUNCTIONALS}


@pytest.mark.parametrize("normalization", ["per_token", "per_sequence"])
@pytest.mark.parametrize("what", ["per_decision", "weighted", "derivative of weighted"])
def test_influences_through_the_tokens(everything: Everything, what: str, normalization: Normalization):
    """What one copy more and one less of a sequence does to an estimate that all sequences normalise together."""
    batch, copies = everything.drawn(12, seed=4), 60
    at_eta = batch.at(1.0)

    def estimate(chosen: list[int]) -> uncertainty.Estimate:
        chosen_N = torch.tensor(chosen)
        part, of_part = batch.subset(chosen_N), taken(*at_eta, chosen_N, *batch.tokens_of(chosen_N))
        if what == "derivative of weighted":
            return uncertainty.entropy_derivative(weighted(part), normalization)
        if what == "weighted":
            return uncertainty.entropy(*weighted_per_decision(of_part), normalization)
        return uncertainty.entropy(*per_decision(of_part, no_baseline(part)), normalization)

    everyone = list(range(12)) * copies
    found = estimate(list(range(12)))
    assert found.value == pytest.approx(estimate(everyone).value, rel=1e-10)
    for i in range(12):
        more, less = estimate([*everyone, i]).value, estimate(everyone[:i] + everyone[i + 1 :]).value
        expected = (more - less) / 2 * 12 * copies
        assert found.influence_N[i].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


# --- between the two -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["none", "time_loo", "time_loo_weighted"])
def test_per_decision_grows_as_first_order_says_sequence_by_sequence(everything: Everything, baseline: Baseline):
    batch, step = everything.drawn(60), 1e-5
    base = batch.base(baseline)
    above, below = (per_decision(batch.at(eta), base) for eta in (step, -step))
    columns = batch.columns(baseline)
    for functional, a_N, b_N in zip((ENTROPY, LENGTH), above, below, strict=True):
        torch.testing.assert_close((a_N - b_N) / (2 * step), columns[functional].derivative_N, rtol=1e-6, atol=1e-8)
    for normalization in ("per_token", "per_sequence"):
        rise = uncertainty.entropy(*above, normalization).minus(uncertainty.entropy(*below, normalization))
        derivative = uncertainty.entropy_derivative(columns, normalization)
        assert rise.value / (2 * step) == pytest.approx(derivative.value, rel=1e-6)
        torch.testing.assert_close(rise.influence_N / (2 * step), derivative.influence_N, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("normalization", ["per_token", "per_sequence"])
def test_weighted_per_decision_grows_as_its_derivative_says(everything: Everything, normalization: Normalization):
    batch, step = everything.drawn(60), 1e-5
    above, below = (uncertainty.entropy(*weighted_per_decision(batch.at(eta)), normalization) for eta in (step, -step))
    columns = weighted(batch)
    derivative, rise = uncertainty.entropy_derivative(columns, normalization), above.minus(below)
    assert rise.value / (2 * step) == pytest.approx(derivative.value, rel=1e-6)
    torch.testing.assert_close(rise.influence_N / (2 * step), derivative.influence_N, rtol=1e-5, atol=1e-7)
    others = batch.columns("time_loo")
    for functional in FUNCTIONALS:
        torch.testing.assert_close(columns[functional].total_N, others[functional].total_N, rtol=1e-13, atol=1e-14)
        assert torch.equal(columns[functional].local_N, others[functional].local_N)


@pytest.mark.parametrize("normalization", ["per_token", "per_sequence"])
def test_snis_grows_as_its_derivative_says(everything: Everything, normalization: Normalization):
    batch, step = everything.drawn(60), 1e-5
    columns = batch.columns("time_loo")

    def snis(eta: float) -> uncertainty.Estimate:
        moved, weights = batch.at(eta)
        moved_S_N = ragged.sequence_sum(moved.entropies_K, batch.offsets_N1)
        return uncertainty.snis_entropy(weights.sequence_N, moved_S_N, columns[LENGTH].total_N, normalization)

    at_zero = uncertainty.entropy(columns[ENTROPY].total_N, columns[LENGTH].total_N, normalization)
    assert snis(0.0).value == pytest.approx(at_zero.value, rel=1e-12)
    rise = snis(step).minus(snis(-step))
    score_N = ragged.sequence_sum(batch.tokens.dlogprobs_K, batch.offsets_N1)
    derivative = uncertainty.snis_derivative(columns, score_N, normalization)
    assert rise.value / (2 * step) == pytest.approx(derivative.value, rel=1e-6)
    torch.testing.assert_close(rise.influence_N / (2 * step), derivative.influence_N, rtol=1e-5, atol=1e-7)


def test_the_derivative_of_snis_has_the_mean_of_the_entropys(everything: Everything):
    columns, world, v = everything.columns("none"), everything.world, everything.v
    score_N = ragged.sequence_sum(everything.tokens.dlogprobs_K, everything.offsets_N1)
    S, T = everything.mean(columns[ENTROPY].total_N), everything.mean(columns[LENGTH].total_N)
    x = everything.mean(score_N * columns[ENTROPY].total_N + columns[ENTROPY].local_N)
    assert x == pytest.approx(world.derivative(lambda exact: exact.H_seq, v), abs=EXACT)
    per_token = (x - S / T * everything.mean(score_N * columns[LENGTH].total_N)) / T
    assert per_token == pytest.approx(world.derivative(lambda exact: exact.H_tok, v), abs=EXACT)


@pytest.mark.parametrize("name", ["H_seq", "H_tok"])
def test_what_first_order_leaves_out_is_of_second_order(everything: Everything, name: str):
    world, v = everything.world, everything.v
    slope, at_zero = world.derivative(lambda exact: getattr(exact, name), v), getattr(world.exact(), name).item()
    etas = torch.logspace(-3, -1.5, 7, dtype=torch.float64)
    left = [abs(getattr(world.exact_at(v, e), name).item() - at_zero - e * slope) for e in etas.tolist()]
    x, y = etas.log(), torch.tensor(left, dtype=torch.float64).log()
    fitted = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert float(fitted) == pytest.approx(2.0, abs=0.05)


# --- backward mode ---------------------------------------------------------------------------------------------------


def gradients_of(batch: Everything, weights: list[Coefficients]) -> list[Direction]:
    policy = batch.world.policy
    found = [policy.new_accumulator() for _ in weights]
    for index_K, rows in processor_of(batch.world).micro_batches(batch.sequences):
        picked = [Coefficients(c.logprob_K[index_K], c.entropy_K[index_K]) for c in weights]
        policy.add_gradients(rows, picked, batch.world.temperature, found)
    return found


def test_score_coefficients_give_the_gradient_of_the_entropy_and_of_the_length(everything: Everything):
    score_K, length_K = (score_coefficients(f, everything.block, "none") for f in (ENTROPY, LENGTH))
    probability_K = torch.repeat_interleave(everything.probability_N, everything.sequences.lengths_N)
    nothing_K = torch.zeros_like(probability_K)
    found = gradients_of(
        everything,
        [Coefficients(probability_K * score_K, probability_K), Coefficients(probability_K * length_K, nothing_K)],
    )
    parameters = everything.world.policy.named_parameters()
    for gradient, value in zip(found, everything.world.exact(), strict=True):
        expected = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        for name, g in zip(parameters, expected, strict=True):
            torch.testing.assert_close(gradient[name], g, rtol=0, atol=EXACT)


@pytest.mark.parametrize("baseline", ["none", "time_loo"])
def test_backward_and_forward_mode_agree_on_a_batch(everything: Everything, baseline: Baseline):
    batch = everything.drawn(80)
    score_K, length_K = (score_coefficients(f, batch.block, baseline) for f in (ENTROPY, LENGTH))
    even_K = torch.full_like(score_K, 1 / 80)
    entropy_gradient, length_gradient = gradients_of(
        batch,
        [Coefficients(even_K * score_K, even_K), Coefficients(even_K * length_K, torch.zeros_like(even_K))],
    )
    columns = batch.columns(baseline)
    X, Y = (sum(float((g[name] * t).sum()) for name, t in batch.v.items()) for g in (entropy_gradient, length_gradient))
    H, L = float(columns[ENTROPY].total_N.sum() / columns[LENGTH].total_N.sum()), float(columns[LENGTH].total_N.mean())
    assert uncertainty.entropy_derivative(columns, "per_sequence").value == pytest.approx(X, rel=1e-10)
    assert uncertainty.entropy_derivative(columns, "per_token").value == pytest.approx((X - H * Y) / L, rel=1e-10)

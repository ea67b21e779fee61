"""Influences against added and removed copies of a sequence; standard errors against jackknife, bootstrap and coverage.

No formula of an influence is repeated here: what one sequence does to an estimate is found by giving the data set one
copy of it more and one less.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from conftest import World, gpt2, policy_of
from enumeration import Everything, as_tokens, columns_of, enumerate_world, rloo_coefficients, token_gradients
from scipy import stats
from torch import Tensor

from entropy_core.numerics import adamw, ragged
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState
from entropy_core.numerics.choices import Normalization
from entropy_core.numerics.first_order import score_coefficients
from entropy_core.numerics.functional import ENTROPY, LENGTH, Columns, Functional
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.uncertainty import (
    Estimate,
    clustered_sum_standard_error,
    entropy,
    entropy_derivative,
    excess_kurtosis,
    jackknife_standard_error,
    normal_quantile,
    snis_derivative,
    snis_entropy,
    standard_error,
    total_standard_error,
)

NORMALIZATIONS: list[Normalization] = ["per_token", "per_sequence"]
both = pytest.mark.parametrize("normalization", NORMALIZATIONS)


class Data(NamedTuple):
    """Columns of made-up sequences, correlated and of uneven length, [N]."""

    x_N: Tensor
    y_N: Tensor
    local_N: Tensor
    S_N: Tensor
    T_N: Tensor
    score_N: Tensor
    weight_N: Tensor

    def take(self, index_N: Tensor) -> "Data":
        return Data(*(column_N[index_N] for column_N in self))

    @property
    def columns(self) -> dict[Functional, Columns]:
        return of_both(self.x_N, self.y_N, self.local_N, self.S_N, self.T_N)


def of_both(x_N: Tensor, y_N: Tensor, local_N: Tensor, S_N: Tensor, T_N: Tensor) -> dict[Functional, Columns]:
    return {ENTROPY: Columns(S_N, x_N, local_N), LENGTH: Columns(T_N, y_N, 0 * y_N)}


def made_up(N: int, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    a_N, b_N, c_N, d_N = torch.randn(4, N, generator=generator, dtype=torch.float64)
    T_N = (8 + 3 * a_N).round().clamp(1, 20)
    S_N = 0.7 * T_N + b_N**2
    return Data(
        x_N=0.3 * S_N * c_N + d_N - 0.5,
        y_N=T_N * c_N + 0.2 * a_N + 0.4,
        local_N=0.5 * d_N - 0.2,
        S_N=S_N,
        T_N=T_N,
        score_N=c_N,
        weight_N=(0.4 * c_N + 0.1 * b_N).exp(),
    )


ESTIMATORS: dict[str, Callable[[Data, Normalization], Estimate]] = {
    "entropy": lambda data, n: entropy(data.S_N, data.T_N, n),
    "entropy_derivative": lambda data, n: entropy_derivative(data.columns, n),
    "entropy of weighted terms": lambda data, n: entropy(data.S_N * data.weight_N, data.T_N + data.y_N, n),
    "snis_entropy": lambda data, n: snis_entropy(data.weight_N, data.S_N, data.T_N, n),
    "snis_derivative": lambda data, n: snis_derivative(data.columns, data.score_N, n),
    "change": lambda data, n: snis_entropy(data.weight_N, data.S_N, data.T_N, n).minus(entropy(data.S_N, data.T_N, n)),
    "curvature": lambda data, n: ESTIMATORS["change"](data, n).minus(entropy_derivative(data.columns, n).scaled(0.1)),
}
each = pytest.mark.parametrize("name", ESTIMATORS)


# --- values and influences -------------------------------------------------------------------------------------------


def test_values_by_hand():
    S_N, T_N = torch.tensor([2.0, 4.0], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    x_N, y_N = torch.tensor([1.0, 5.0], dtype=torch.float64), torch.tensor([-2.0, 4.0], dtype=torch.float64)
    columns = of_both(x_N, y_N, torch.tensor([0.5, 0.5]).double(), S_N, T_N)
    assert entropy(S_N, T_N, "per_sequence").value == 3.0
    assert entropy(S_N, T_N, "per_token").value == 1.5
    assert entropy_derivative(columns, "per_sequence").value == 3.0
    assert entropy_derivative(columns, "per_token").value == (3.0 - 1.5 * 1.0) / 2.0
    w_N = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert snis_entropy(w_N, S_N, T_N, "per_sequence").value == (3 * 2 + 4) / 4
    assert snis_entropy(w_N, S_N, T_N, "per_token").value == pytest.approx((3 * 2 + 4) / (3 * 1 + 3), rel=1e-15)
    s_N = torch.tensor([1.0, -1.0], dtype=torch.float64)
    # Σ w(S + η·local) over Σ w, with w = 1 + ηs: (−1 + 0.5) − 3·0;  over Σ wT: (−0.5 − 1.5·(−1))/2
    assert snis_derivative(columns, s_N, "per_sequence").value == -0.5
    assert snis_derivative(columns, s_N, "per_token").value == 0.5


@each
@both
def test_an_influence_is_what_one_more_copy_of_the_sequence_does(name: str, normalization: Normalization):
    data, copies = made_up(10), 300
    estimator = ESTIMATORS[name]
    found = estimator(data, normalization)
    everyone = torch.arange(10).repeat(copies)
    moves = []
    for i in range(10):
        more = estimator(data.take(torch.cat([everyone, torch.tensor([i])])), normalization).value
        less = estimator(data.take(torch.cat([everyone[:i], everyone[i + 1 :]])), normalization).value
        moves.append((more - less) / 2 * 10 * copies)
    expected_N = torch.tensor(moves, dtype=torch.float64)
    torch.testing.assert_close(found.influence_N, expected_N, rtol=2e-4, atol=2e-4 * float(expected_N.abs().max()))
    assert abs(float(found.influence_N.sum())) < 1e-11
    assert found.influence_N.abs().max() > 0.01


def test_weights_matter_up_to_a_factor():
    data = made_up(30)
    one = snis_entropy(data.weight_N, data.S_N, data.T_N, "per_token")
    other = snis_entropy(data.weight_N * 1e30, data.S_N, data.T_N, "per_token")
    assert other.value == pytest.approx(one.value, rel=1e-12)
    torch.testing.assert_close(other.influence_N, one.influence_N, rtol=1e-10, atol=1e-12)


def test_scaling_and_paired_differences():
    data = made_up(30)
    a, b = (entropy_derivative(data.columns, n) for n in NORMALIZATIONS)
    assert a.scaled(-3.0).value == -3.0 * a.value
    assert standard_error(a.scaled(-3.0).influence_N) == pytest.approx(3.0 * standard_error(a.influence_N), rel=1e-14)
    nothing = a.minus(a)
    assert nothing.value == 0.0 and standard_error(nothing.influence_N) == 0.0
    covariance = float(torch.cov(torch.stack([a.influence_N, b.influence_N]))[0, 1]) / 30
    variance = standard_error(a.influence_N) ** 2 + standard_error(b.influence_N) ** 2 - 2 * covariance
    assert standard_error(a.minus(b).influence_N) == pytest.approx(math.sqrt(variance), rel=1e-12)


# --- standard errors -------------------------------------------------------------------------------------------------


def test_the_standard_error_of_a_mean():
    S_N = made_up(40).S_N
    expected = stats.sem(S_N.numpy())
    assert standard_error(entropy(S_N, torch.ones_like(S_N), "per_sequence").influence_N) == pytest.approx(expected)


@each
@both
def test_standard_errors_agree_with_a_brute_force_jackknife(name: str, normalization: Normalization):
    N = 400
    data = made_up(N)
    keep = [torch.cat([torch.arange(i), torch.arange(i + 1, N)]) for i in range(N)]
    without_N = torch.tensor([ESTIMATORS[name](data.take(index_N), normalization).value for index_N in keep]).double()
    jackknife = math.sqrt((N - 1) / N * float(((without_N - without_N.mean()) ** 2).sum()))
    assert standard_error(ESTIMATORS[name](data, normalization).influence_N) == pytest.approx(jackknife, rel=0.02)
    if name == "entropy_derivative":
        assert jackknife_standard_error(data.columns, normalization) == pytest.approx(jackknife, rel=1e-5)


@pytest.mark.parametrize("name", ["entropy_derivative", "snis_entropy", "curvature"])
@both
def test_standard_errors_agree_with_a_brute_force_bootstrap(name: str, normalization: Normalization):
    N, resamples = 300, 1500
    data, generator = made_up(N), torch.Generator().manual_seed(1)
    values = [
        ESTIMATORS[name](data.take(torch.randint(N, (N,), generator=generator)), normalization).value
        for _ in range(resamples)
    ]
    bootstrap = stats.tstd(values)
    # 4 standard errors of a standard deviation, and the O(1/N) between the two methods
    found = standard_error(ESTIMATORS[name](data, normalization).influence_N)
    assert found == pytest.approx(bootstrap, rel=4 / math.sqrt(2 * resamples) + 0.01)


def test_clusters_of_one_are_no_clusters_and_copies_bring_nothing():
    influence_N = entropy_derivative(made_up(50).columns, "per_token").influence_N
    alone = standard_error(influence_N)
    assert standard_error(influence_N, torch.randperm(50) * 3) == pytest.approx(alone, rel=1e-14)
    # every sequence four times, as one cluster: the same data, N four times as large
    fourfold_N, clusters_N = influence_N.repeat(4), torch.arange(50).repeat(4)
    assert standard_error(fourfold_N, clusters_N) == pytest.approx(alone, rel=1e-14)
    assert standard_error(fourfold_N) < 0.51 * alone


@both
def test_the_jackknife_deletes_whole_clusters(normalization: Normalization):
    data, clusters_N = made_up(60), torch.randint(7, (60,)) * 11
    values = []
    for cluster in clusters_N.unique():
        rest = data.take((clusters_N != cluster).nonzero().squeeze(1))
        values.append(entropy_derivative(rest.columns, normalization).value)
    C, without_C = len(values), torch.tensor(values, dtype=torch.float64)
    expected = math.sqrt((C - 1) / C * float(((without_C - without_C.mean()) ** 2).sum()))
    found = jackknife_standard_error(data.columns, normalization, clusters_N)
    assert found == pytest.approx(expected, rel=1e-12)
    alone = jackknife_standard_error(data.columns, normalization)
    assert jackknife_standard_error(data.columns, normalization, torch.randperm(60)) == pytest.approx(alone, rel=1e-12)


def test_too_few_units_have_no_standard_error():
    one_N = torch.zeros(1, dtype=torch.float64)
    assert math.isnan(standard_error(one_N))
    assert math.isnan(standard_error(torch.randn(6).double(), torch.zeros(6).long()))
    assert math.isnan(clustered_sum_standard_error(torch.randn(1, 5).double()))
    single = of_both(*(one_N + 1 for _ in range(5)))
    assert math.isnan(jackknife_standard_error(single, "per_token"))
    for of_e, of_u in (((0.1, 30), (math.nan, 1)), ((math.nan, 1), (0.1, 30)), ((math.nan, 1), (math.nan, 1))):
        assert all(math.isnan(number) for number in total_standard_error(*of_e, *of_u))
    assert math.isnan(jackknife_standard_error(made_up(5).columns, "per_token", torch.zeros(5).long()))


def test_clustered_standard_errors_have_the_right_mean():
    """A ratio over clusters of different size with a common shock: E[SE²] against the variance that is seen."""
    generator = torch.Generator().manual_seed(3)
    replications, clusters, largest = 2000, 80, 6
    estimates, squares, naive = [], [], []
    for _ in range(replications):
        sizes_C = torch.randint(1, largest + 1, (clusters,), generator=generator)
        of_N = torch.repeat_interleave(torch.arange(clusters), sizes_C)
        shock_C, own_N = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (clusters, len(of_N)))
        T_N = torch.randint(1, 9, (len(of_N),), generator=generator).double()
        found = entropy(T_N * (1 + 0.3 * shock_C[of_N]) + 0.5 * own_N, T_N, "per_token")
        estimates.append(found.value)
        squares.append(standard_error(found.influence_N, of_N) ** 2)
        naive.append(standard_error(found.influence_N) ** 2)
    ratio = torch.tensor(squares).mean() / torch.tensor(estimates).var()
    assert float(ratio) == pytest.approx(1.0, abs=4 * math.sqrt(2 / replications) + 0.01)
    assert sum(naive) < 0.5 * sum(squares)


def test_the_standard_error_of_a_sum_over_prompts():
    c_PG = torch.tensor([[1.0, 2.0], [0.0, -1.0], [4.0, 0.0]], dtype=torch.float64)  # sums 3, −1, 4: variance 7
    assert clustered_sum_standard_error(c_PG) == pytest.approx(math.sqrt(3 * 7.0), rel=1e-15)
    assert clustered_sum_standard_error(10 * c_PG) == pytest.approx(10 * math.sqrt(21.0), rel=1e-15)
    # 5 responses to a prompt with a common shock of variance 1/2: Var(Σ) = 12·(5 + 25/2)
    generator = torch.Generator().manual_seed(2)
    shape = (4000, 12, 5)
    draws = torch.randn(shape, generator=generator) + math.sqrt(0.5) * torch.randn(4000, 12, 1, generator=generator)
    squares = torch.tensor([clustered_sum_standard_error(c.double()) ** 2 for c in draws])
    assert abs(float(squares.mean()) - 12 * 17.5) < 4 * float(squares.std()) / math.sqrt(4000)


def test_the_total_adds_variances_and_counts_freedom_as_welch_does():
    a, b = torch.randn(40).double(), 3 * torch.randn(9).double()
    se_a, se_b = (float(sample.std()) / math.sqrt(len(sample)) for sample in (a, b))
    total = total_standard_error(se_a, 40, se_b, 9)
    welch = stats.ttest_ind(a.numpy(), b.numpy(), equal_var=False)
    assert total.degrees_of_freedom == pytest.approx(float(welch.df), rel=1e-12)
    assert total.standard_error == pytest.approx(abs(float(a.mean() - b.mean()) / float(welch.statistic)), rel=1e-12)
    assert total_standard_error(0.0, 40, 0.0, 9) == (0.0, 39.0)
    assert total_standard_error(0.3, 40, 0.0, 9).degrees_of_freedom == pytest.approx(39.0)


def test_the_total_is_wide_by_one_interaction():
    """Mean of an N×P table with row, column and cell effects: E[SE²_E + SE²_U] = Var + σ²_cell/(N·P)."""
    generator = torch.Generator().manual_seed(4)
    N, P, replications = 12, 8, 6000
    rows = torch.randn(replications, N, 1, generator=generator, dtype=torch.float64)
    columns = 0.7 * torch.randn(replications, 1, P, generator=generator, dtype=torch.float64)
    table = rows + columns + 3 * torch.randn(replications, N, P, generator=generator, dtype=torch.float64)
    squares = torch.tensor(
        [
            total_standard_error(
                standard_error(cells.mean(1) - cells.mean()),
                N,
                clustered_sum_standard_error(cells.mean(0)[:, None] / P),
                P,
            ).standard_error
            ** 2
            for cells in table
        ]
    )
    variance, interaction = 1 / N + 0.49 / P + 9 / (N * P), 9 / (N * P)
    assert abs(float(squares.mean()) - variance - interaction) < 4 * float(squares.std()) / math.sqrt(replications)


def test_quantile_and_kurtosis():
    for level in (0.5, 0.9, 0.95, 0.999):
        assert normal_quantile(level) == pytest.approx(float(stats.norm.ppf(0.5 + level / 2)), rel=1e-12)
    influence_N = entropy(made_up(80).S_N, made_up(80).T_N, "per_token").influence_N
    assert excess_kurtosis(influence_N) == pytest.approx(float(stats.kurtosis(influence_N.numpy())), rel=1e-10)
    assert excess_kurtosis(torch.zeros(5).double()) == 0.0


# --- coverage --------------------------------------------------------------------------------------------------------


def share_covered(truth: float, values: Sequence[float], errors: Sequence[float], freedom: Sequence[float]) -> float:
    quantile = stats.t.ppf(0.975, freedom)
    distance = torch.tensor(values, dtype=torch.float64) - truth
    return float((distance.abs() <= torch.tensor(quantile * errors)).double().mean())


def test_coverage_of_a_ratio():
    """Uneven lengths, entropies that grow with them: E[S]/E[T] is known."""
    generator = torch.Generator().manual_seed(6)
    N, replications = 100, 4000
    u_RN, b_RN = torch.rand(2, replications, N, generator=generator, dtype=torch.float64)
    T_RN = (1 + 12 * u_RN).floor()  # 1, …, 12, evenly: mean 6.5, mean square 325/6
    S_RN = 0.1 * T_RN**2 + T_RN * b_RN
    truth = (0.1 * 325 / 6 + 6.5 * 0.5) / 6.5
    found = [entropy(S_N, T_N, "per_token") for S_N, T_N in zip(S_RN, T_RN, strict=True)]
    errors = [standard_error(estimate.influence_N) for estimate in found]
    covered = share_covered(truth, [estimate.value for estimate in found], errors, [N - 1] * replications)
    assert 0.94 <= covered <= 0.96


def test_coverage_over_e_on_the_enumerated_policy(world: World, v: dict[str, Tensor]):
    everything = enumerate_world(world, v)
    N, replications = 200, 800
    truths = [world.derivative(lambda e: e.H_tok, v), world.derivative(lambda e: e.H_seq, v)]
    generator = torch.Generator().manual_seed(0)
    found: list[list[Estimate]] = [[], []]
    for _ in range(replications):
        chosen_N = torch.multinomial(everything.probability_N, N, replacement=True, generator=generator)
        pick_K, offsets_N1 = everything.tokens_of(chosen_N)
        tokens = TokenDerivatives(*(column_K[pick_K] for column_K in everything.tokens))
        columns = columns_of(as_tokens(tokens, offsets_N1), "time_loo")
        for estimates, normalization in zip(found, NORMALIZATIONS, strict=True):
            estimates.append(entropy_derivative(columns, normalization))
    for truth, estimates in zip(truths, found, strict=True):
        values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
        errors = torch.tensor([standard_error(estimate.influence_N) for estimate in estimates], dtype=torch.float64)
        covered = share_covered(truth, values.tolist(), errors.tolist(), [N - 1] * replications)
        assert covered == pytest.approx(0.95, abs=2 * math.sqrt(0.95 * 0.05 / replications))
        assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(replications)
        assert float(errors.square().mean().sqrt() / values.std()) == pytest.approx(1.0, abs=0.06)


class Gradients(NamedTuple):
    """Of every response of a policy, one row each, over all parameters: [responses, parameters]."""

    x: Tensor  # ⟨x, v⟩ is the sequence's x along v, without a baseline
    y: Tensor
    score: Tensor  # of Σ_k ℓ_k


@pytest.fixture(scope="module")
def small() -> tuple[Everything, Gradients]:
    world = World(policy_of(gpt2(vocabulary=3)), [[1], [0, 2, 1], [0, 0]], temperature=0.8, max_new_tokens=3)
    zero = {name: torch.zeros_like(p).detach() for name, p in world.policy.named_parameters().items()}
    everything = enumerate_world(world, zero)
    score_KQ, entropy_KQ = token_gradients(everything)
    to_come_K, length_K = (score_coefficients(f, everything.block, "none") for f in (ENTROPY, LENGTH))

    def per_response(values_KQ: Tensor) -> Tensor:
        index_K = ragged.sequence_index(everything.offsets_N1)
        return values_KQ.new_zeros(len(everything.sequences), values_KQ.shape[1]).index_add_(0, index_K, values_KQ)

    x_KQ = entropy_KQ + to_come_K[:, None] * score_KQ
    return everything, Gradients(*map(per_response, (x_KQ, length_K[:, None] * score_KQ, score_KQ)))


def test_coverage_over_both_batches(small: tuple[Everything, Gradients]):
    """E and U drawn anew each time; the update is an AdamW step on U, the target its mean effect on H_tok.

    β₂ = 0.999: a step is nearly linear in the gradient. Where it is not, the standard error stays right and the law of
    the estimate is skew.
    """
    everything, gradients = small
    world, law_R, columns = everything.world, everything.probability_N, everything.columns("none")
    S_R, T_R = columns[ENTROPY].total_N, columns[LENGTH].total_N
    lengths_R = everything.sequences.lengths_N
    law_3R = torch.stack([torch.where(everything.sequences.prompt_ids_N == p, law_R, 0.0) for p in range(3)])
    true_gradient = torch.autograd.grad(world.exact().H_tok, list(world.policy.named_parameters().values()))
    true_gradient = torch.cat([g.flatten() for g in true_gradient])
    generator = torch.Generator().manual_seed(8)
    reward_R = torch.randn(len(law_R), generator=generator, dtype=torch.float64)
    N, P, G, replications = 300, 40, 4, 800

    def draw_u() -> tuple[Tensor, Tensor]:
        """Loss coefficient and score gradient of each sequence of U."""
        prompts_P = torch.randint(3, (P,), generator=generator)
        u_PG = torch.multinomial(law_3R[prompts_P], G, replacement=True, generator=generator)
        coefficients_N = rloo_coefficients(reward_R[u_PG], lengths_R[u_PG.flatten()])
        return coefficients_N, gradients.score[u_PG.flatten()]

    past = torch.stack([coefficients_N @ score_NQ for coefficients_N, score_NQ in (draw_u() for _ in range(100))])
    state = AdamState(10_000, past.mean(0), past.square().mean(0))  # in the middle of a run
    parameter, hyperparameters = torch.zeros_like(true_gradient), AdamHyperparameters(0.9, 0.999, 1e-8, 0.0)
    found = []
    for _ in range(replications):
        coefficients_N, score_NQ = draw_u()
        gradient = coefficients_N @ score_NQ
        parts = adamw.NextStep(gradient, parameter, state, hyperparameters)
        v = parts.direction
        e_N = torch.multinomial(law_R, N, replacement=True, generator=generator)
        x_N, y_N, S_N, T_N = (c[e_N] for c in (gradients.x @ v, gradients.y @ v, S_R, T_R))
        estimate = entropy_derivative(of_both(x_N, y_N, 0 * x_N, S_N, T_N), "per_token")
        H, L = float(S_N.sum() / T_N.sum()), float(T_N.mean())
        share_R = torch.bincount(e_N, minlength=len(law_R)).double() / N
        covectors = {"known": true_gradient, "estimated": share_R @ (gradients.x - H * gradients.y) / L}
        errors_u = []
        for covector in covectors.values():
            w = adamw.pull_back({"all": covector}, {"all": parts.jacobian}, {"all": gradient}, 0.0)["all"]
            errors_u.append(clustered_sum_standard_error((coefficients_N * (score_NQ @ w)).view(P, G)))
        total = total_standard_error(standard_error(estimate.influence_N), N, errors_u[1], P)
        found.append((float(true_gradient @ v), errors_u[0], estimate.value, *total))
    exact, error_u, values, error, freedom = torch.tensor(found, dtype=torch.float64).T
    target = float(exact.mean())
    # U alone, with the entropy's gradient known
    two_errors = 2 * math.sqrt(0.95 * 0.05 / replications)
    covered = share_covered(target, exact.tolist(), error_u.tolist(), [P - 1] * replications)
    assert covered == pytest.approx(0.95, abs=two_errors)
    assert float(error_u.square().mean().sqrt() / exact.std()) == pytest.approx(1.0, abs=0.06)
    # both, and neither of them negligible
    covered = share_covered(target, values.tolist(), error.tolist(), freedom.tolist())
    assert covered == pytest.approx(0.95, abs=two_errors)
    assert 0.2 < float(exact.var() / values.var()) < 0.8

"""Planned power against that of simulated sweeps, whose E and U are drawn from the enumerated law of a tiny policy.

δH₁ is linear in ∇H of a response of E and, the moments and denominators of AdamW being as they are, in the gradient on
a prompt of U. So every response of E and every prompt of a large pool has a contribution for each prompt and response
of the other, which is computed once: a sweep is then a choice of rows and columns. Its estimate, errors, degrees of
freedom and p-value are those that the package computes of them.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import pytest
import torch
from oracle.scenarios import SCENARIOS, Ready
from proofs import Proof, percent
from torch import Tensor

from entropy_core.estimates import interventions as estimates
from entropy_core.estimates import power
from entropy_core.estimates.intervals import Randomness, intervals
from entropy_core.estimates.interventions import Predicted, Screened, Settings
from entropy_core.estimates.power import Components, Size, TTest
from entropy_core.losses.apart import token_coefficients
from entropy_core.numerics import half_samples, interventions, ragged, uncertainty
from entropy_core.numerics.baselines import returns_to_go
from entropy_core.numerics.block_estimates import Blocks
from entropy_core.numerics.functional import ENTROPY, FUNCTIONALS, Columns, TokenPair, Tokens
from entropy_core.numerics.half_samples import HalfSteps
from entropy_core.numerics.halves import by_normalization, entropy_and_length, of_all
from entropy_core.numerics.interventions import Known, add_up
from entropy_core.pipeline.lab import BLOCKS
from entropy_core.store.columns import TokenTable

pytestmark = pytest.mark.validate

TEST, SECONDS = TTest(0.95), (0.05, 1.0)
POOL, PILOTS, SWEEPS = 4000, 400, 4


class Population:
    """What each response of E and each prompt of U do to δH₁, per unit step.

    Args:
        label: of one of `oracle.scenarios.SCENARIOS`, with a loss that is a mean over prompts.
    """

    def __init__(self, label: str) -> None:
        [scenario] = [one for one in SCENARIOS if one.label == label]
        ready = Ready(scenario)
        self.laboratory, trainer = ready.laboratory, ready.trainer._replace(prompts=POOL)
        self.law_R, responses = self.laboratory.law_R, self.laboratory.responses
        self.S_R = ragged.sequence_sum(self.laboratory.scores.entropies_K, responses.offsets_R1)
        self.T_R = responses.lengths_R.double()
        parts = self.laboratory.step(ready.trainer, self.laboratory.draw_u(ready.trainer, ready.generator)).parts
        u_N = self.laboratory.draw_u(trainer, ready.generator)
        pick_K, offsets_N1 = self.laboratory.of_tokens(u_N)
        columns = {"logprobs": self.laboratory.scores.logprobs_K[pick_K]}
        columns |= {"entropies": self.laboratory.scores.entropies_K[pick_K]}
        tokens = TokenTable(torch.arange(len(u_N)), offsets_N1, columns)
        rewards_PG = trainer.reward_R[u_N].view(-1, trainer.G)
        batch = trainer.loss.batch(tokens, rewards_PG, responses.truncated_R[u_N])
        self.informative_P = (rewards_PG != rewards_PG[:, :1]).any(1)
        nothing_K = torch.zeros_like(batch.logprobs_K)
        terms = interventions.positives_only(Known(batch, nothing_K, nothing_K, 0))
        of_terms = [token_coefficients(trainer.loss.name, term.batch) for term in terms]
        pairs = [token_coefficients(trainer.loss.name, batch), add_up(terms, of_terms)]
        prompt_K = ragged.sequence_index(offsets_N1) // trainer.G
        as_it_is, changed = (parts.preconditioner * POOL * self._by_prompt(pair, pick_K, prompt_K) for pair in pairs)
        covectors = self._covectors()
        self.momentum_KR = torch.stack([of_R @ parts.momentum for of_R in covectors])
        self.step_KRP = torch.stack([of_R @ as_it_is.T for of_R in covectors])
        self.difference_KRP = torch.stack([of_R @ (changed - as_it_is).T for of_R in covectors])

    def _by_prompt(self, pair: TokenPair, pick_K: Tensor, prompt_K: Tensor) -> Tensor:
        """The gradient on each prompt of the pool, [P, Q]."""
        laboratory, states_K = self.laboratory, self.laboratory.responses.state_K[pick_K]
        found = torch.zeros(POOL, laboratory.logprob_KQ.shape[1], dtype=torch.float64)
        for part in torch.arange(len(pick_K)).split(20_000):
            of_logprob = pair.logprob_K[part, None] * laboratory.logprob_KQ[pick_K[part]]
            of_entropy = pair.entropy_K[part, None] * laboratory.entropy_SQ[states_K[part]]
            found.index_add_(0, prompt_K[part], of_logprob + of_entropy)
        return found

    def _covectors(self) -> list[Tensor]:
        """What each response adds to ∇H_seq and to ∇L, with the baselines of an endless E, [R, Q]."""
        laboratory, responses = self.laboratory, self.laboratory.responses
        entropies_K = laboratory.scores.entropies_K
        tokens = Tokens(laboratory.scores.logprobs_K, entropies_K, responses.offsets_R1)
        position_K = ragged.position_index(responses.offsets_R1)
        response_K = ragged.sequence_index(responses.offsets_R1)
        law_K, none_T = self.law_R[response_K], torch.zeros(responses.max_new_tokens, dtype=torch.float64)
        found = []
        for functional in FUNCTIONALS:
            return_K = returns_to_go(functional, tokens)
            mean_T = none_T.index_add(0, position_K, law_K * return_K) / none_T.index_add(0, position_K, law_K)
            of_score_K = return_K - mean_T[position_K]
            covector_RQ = torch.zeros(len(self.law_R), laboratory.logprob_KQ.shape[1], dtype=torch.float64)
            covector_RQ.index_add_(0, response_K, of_score_K[:, None] * laboratory.logprob_KQ)
            if functional is ENTROPY:
                covector_RQ.index_add_(0, response_K, laboratory.entropy_SQ[responses.state_K])
            found.append(covector_RQ)
        return found

    def derivative(self, along_KR: Tensor) -> float:
        """The exact change of H_tok per unit step, from what each response adds to it."""
        of_entropy, of_length = (float(self.law_R @ along_R) for along_R in along_KR)
        L = float(self.law_R @ self.T_R)
        return (of_entropy - float(self.law_R @ self.S_R) / L * of_length) / L

    def on(self, law_R: Tensor, sequences: int) -> dict[str, Any]:
        """A part of E as the tables of a sweep have it."""
        L = float(law_R @ self.T_R)
        return {"sequences": sequences, "H_tok": float(law_R @ self.S_R) / L, "mean_length": L}

    def shares(self, e_N: Tensor) -> Tensor:
        """How often each response is among some, [R]."""
        return torch.bincount(e_N, minlength=len(self.law_R)).double() / len(e_N)


class Drawn(NamedTuple):
    """What a sweep estimates, what it should be, and what its row says of the errors."""

    error: float
    row: Mapping[str, Any]
    p_value: Callable[[float], float]  # of a value


class Kind(NamedTuple):
    """A question: of a step or of the difference that an intervention makes, of this update or of the mean one."""

    label: str
    effect: float  # in the standard errors of a pilot
    this_update: bool = False
    differs: bool = False
    whole_e: bool = False  # ∇H is exact, and only U counts


def drawn(population: Population, kind: Kind, size: Size, u_P: Tensor, generator: torch.Generator) -> Drawn:
    """A sweep with an E that is drawn, and with a U."""
    e_N = torch.multinomial(population.law_R, size.of_e, replacement=True, generator=generator)
    return (of_difference if kind.differs else of_step)(population, kind, e_N, u_P)


def of_step(population: Population, kind: Kind, e_N: Tensor, u_P: Tensor) -> Drawn:
    """The row of results.parquet."""
    along_KRP = population.step_KRP[:, :, u_P]
    along_KR = population.momentum_KR + along_KRP.mean(2)
    columns = {
        functional: Columns(total_R[e_N], along_R[e_N], along_R[e_N])
        for functional, total_R, along_R in zip(FUNCTIONALS, (population.S_R, population.T_R), along_KR, strict=True)
    }
    estimate = uncertainty.entropy_derivative(columns, "per_token")
    value, se_given_u = estimate.value, uncertainty.standard_error(estimate.influence_N)
    of_halves = [population.shares(e_N[half::2]) for half in (0, 1)]
    if kind.whole_e:
        value, se_given_u, of_halves = population.derivative(along_KR), 0.0, [population.law_R] * 2
    halves = [population.on(share_R, len(e_N[half::2])) for half, share_R in enumerate(of_halves)]
    influence_KHP = torch.einsum("hr,krp->khp", torch.stack(of_halves), along_KRP) / len(u_P)
    whole = [of_all(halves, list(of_kind_HP)) for of_kind_HP in influence_KHP]
    whole_P = by_normalization(whole, *entropy_and_length(halves))["per_token"]
    halves_2P = torch.stack(
        [
            by_normalization(list(influence_KHP[:, half]), said["H_tok"], said["mean_length"])["per_token"]
            for half, said in enumerate(halves)
        ]
    )
    linearised = uncertainty.clustered_sum_standard_error(whole_P.unsqueeze(1))
    interaction = uncertainty.interaction_variance(whole_P, halves_2P)
    linear = HalfSteps(7, linearised**2, linearised**2, 0.0)
    over_u = half_samples.over_u(
        linearised, interaction, linear, len(u_P), int(population.informative_P[u_P].sum())
    )._replace(invalid="")
    row = {"se_given_u": se_given_u, "se_over_u": over_u.standard_error, "se_interaction": over_u.interaction**0.5}
    row |= {"nonlinearity_over_u": 0.0, "excess_kurtosis": uncertainty.excess_kurtosis(estimate.influence_N)}
    randomness, which = Randomness(len(e_N), over_u), "this_update" if kind.this_update else "mean_update"
    if not kind.this_update:
        along_KR = population.momentum_KR + population.step_KRP.mean(2)

    def p_value(at: float) -> float:
        return intervals("", at, se_given_u, randomness, 1.0, TEST.confidence_level)[1][which]

    return Drawn(value - population.derivative(along_KR), row, p_value)


def of_difference(population: Population, kind: Kind, e_N: Tensor, u_P: Tensor) -> Drawn:
    """The row of interventions.parquet, of an exact step."""
    along_KRP = population.difference_KRP[:, :, u_P]
    along_KR = along_KRP.mean(2)
    of_blocks = [e_N[block::BLOCKS] for block in range(BLOCKS)]
    blocks = [population.on(population.shares(of_block), len(of_block)) for of_block in of_blocks]
    product_KB = torch.stack([along_KR @ population.shares(of_block) for of_block in of_blocks], 1)
    half_HR = torch.stack([population.shares(torch.cat(of_blocks[half::2])) for half in (0, 1)])
    influence_KHP = torch.einsum("hr,krp->khp", half_HR, along_KRP) / len(u_P)
    ones_I, unused_IKH = torch.ones(2, dtype=torch.float64), torch.zeros(2, 2, 2, dtype=torch.float64)
    halves = [population.on(share_R, len(e_N[half::2])) for half, share_R in enumerate(half_HR)]
    screened = Screened(
        ["as it is", "other"],
        [False, False],
        *(unused_IKH, unused_IKH, ones_I, ones_I, unused_IKH),
        torch.stack([torch.zeros_like(influence_KHP), influence_KHP]),
        halves,
    )
    predicted = Predicted(
        {"as it is": torch.zeros_like(product_KB), "other": product_KB}, Blocks.from_summaries(blocks)
    )
    informative = max(half_samples.FEWEST, int(population.informative_P[u_P].sum()))
    settings = Settings(1.0, TEST.confidence_level, 1e-12, informative, fresh=False)
    row = estimates.predict_rows(screened, predicted, settings, "per_token")[1]
    if not kind.this_update:
        along_KR = population.difference_KRP.mean(2)

    def p_value(at: float) -> float:
        errors = [estimates.Error(row["se_over_e"], BLOCKS - 1.0)]
        errors += [] if kind.this_update else [estimates.Error(row["se_over_u"], len(u_P) - 1.0)]
        return estimates._p_value(at, estimates.combined(errors)) or 0.0

    return Drawn(row["difference"] - population.derivative(along_KR), row, p_value)


def components(kind: Kind, row: Mapping[str, Any], size: Size) -> Components:
    """As `pipeline.power` has them from a row."""
    if kind.differs:
        return Components.of_difference(row, size, kind.this_update, BLOCKS)
    return Components.of_pilot(row, size, kind.this_update)


class Counted(NamedTuple):
    """Shares of sweeps that detect an effect, and none; the error of the first between pilots; their sizes."""

    power: float
    error: float
    false: float
    sizes: Sequence[Size]


def simulated(population: Population, kind: Kind, pilot: Size, seed: int, exact: bool = False) -> Counted:
    """Pilots, the sizes that are planned from each (as if its errors were exact), and sweeps of these sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw_u(prompts: int) -> Tensor:
        return torch.randint(POOL, (prompts,), generator=generator)

    typical = [drawn(population, kind, pilot, draw_u(pilot.of_u), generator).row for _ in range(20)]
    effect = kind.effect * fmean(components(kind, row, pilot).standard_error(pilot) for row in typical)
    sizes, shares, false = [], [], 0
    for _ in range(PILOTS):
        u_P = draw_u(pilot.of_u)
        of_pilot = components(kind, drawn(population, kind, pilot, u_P, generator).row, pilot)
        if exact:
            of_pilot = of_pilot._replace(known_e=None, known_u=None)
        if kind.this_update:
            size = Size(power.smallest_e(TEST, of_pilot, effect, pilot.of_u) or 0, pilot.of_u)
        else:
            size = power.cheapest(TEST, of_pilot, effect, SECONDS) or Size(0, 0)
        sizes.append(size)
        found = []
        for _ in range(SWEEPS):
            of_sweep = u_P if kind.this_update else draw_u(size.of_u)
            one = drawn(population, kind, size, of_sweep, generator)
            found.append(one.p_value(one.error + effect) <= 1 - TEST.confidence_level)
            false += one.p_value(one.error) <= 1 - TEST.confidence_level
        shares.append(fmean(found))
    return Counted(fmean(shares), stdev(shares) / PILOTS**0.5, false / PILOTS / SWEEPS, sizes)


KINDS = (
    Kind("this update: over E", 1.5, this_update=True),
    Kind("the mean update: over U alone", 1.5, whole_e=True),
    Kind("the mean update: over both", 1.5),
    Kind("an intervention, this update: over blocks of E", 1.5, this_update=True, differs=True),
    Kind("an intervention, the mean update: over both", 1.5, differs=True),
)


def test_planned_power_is_that_of_the_sweeps(record: Proof):
    record(
        "Planned power",
        claim=f"{PILOTS} pilots with an E of 256; the sizes that the planner proposes from each, so that an effect of "
        "1.5 standard errors of such a pilot is detected in 80 %; and on each plan "
        f"{SWEEPS} sweeps of these sizes, with the effect and without, decided as a row of a sweep is. The "
        "share that detects it, on average over the pilots, ± its standard error. The intervention leaves out the "
        "responses with negative advantages.",
        limit="within 2 points of 80 % and within 3 of 5 %, plus twice the standard error; the last row has none: "
        "there the errors of a pilot are taken for exact",
        columns=("question", "prompts of a pilot", "planned E", "planned U", "detected", "without an effect"),
    )
    population = Population("plain: GRPO, 64 prompts, E of 256")
    missed = []
    cases = [(kind, 32, False) for kind in KINDS] + [(KINDS[1], 16, False), (KINDS[1], 16, True)]
    for kind, prompts, exact in cases:
        found = simulated(population, kind, Size(256, prompts), 1, exact)
        of_e, of_u = (sorted(column)[PILOTS // 2] for column in zip(*found.sizes, strict=True))
        detected = f"{100 * found.power:.1f} ± {100 * found.error:.1f} %"
        label = f"{kind.label}{', the pilot taken for exact' if exact else ''}"
        record.row(label, prompts, "exact" if kind.whole_e else of_e, of_u, detected, percent(found.false))
        chance = (0.05 * 0.95 / PILOTS / SWEEPS) ** 0.5
        right = abs(found.power - TEST.power) <= 0.02 + 2 * found.error and abs(found.false - 0.05) <= 0.03 + 2 * chance
        if exact:
            assert found.power < TEST.power - 0.02  # else the rows above would show nothing
        elif not right:
            missed.append(label)
    record.note("Planned sizes are medians; where nothing but U counts, the prompts are all that is planned.")
    assert not missed, missed


COMPONENTS = (100.0, 100.0, 50.0)
EFFECT = 1.0


def test_the_cheapest_split_beats_the_even_one(record: Proof):
    record(
        "The cheapest split",
        claim="E and U that detect an effect with 80 %, for components of the variance A = "
        f"{COMPONENTS[0]:g}, B = {COMPONENTS[1]:g} and C = {COMPONENTS[2]:g}: the cheapest that the planner finds, and "
        "the cheapest of those that cost as much for E as for U. Seconds go best in the ratio √(A·c_E) : √(B·c_U), "
        "with c_E and c_U those of a unit, so that half and half is best where A·c_E = B·c_U.",
        limit="the cheapest split never costs more, and where A·c_E = B·c_U half and half costs at most 1 % more",
        columns=("A·c_E / (B·c_U)", "E", "U", "seconds", "half and half: E", "U", "seconds", "times as dear"),
    )
    components, dearer = Components(*COMPONENTS), []
    for ratio in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0):
        seconds = (ratio * COMPONENTS[1] / COMPONENTS[0], 1.0)
        cheapest = power.cheapest(TEST, components, EFFECT, seconds)
        even = cheapest_even(components, seconds)
        assert cheapest is not None
        spent = [power.cost(size, seconds) for size in (cheapest, even)]
        dearer.append(spent[1] / spent[0])
        cells = (f"{one:.4g}" for one in (spent[0], *even, spent[1]))
        record.row(f"{ratio:g}", *cheapest, *cells, f"{dearer[-1]:.2f}")
        detects = [TEST.power_at(components, size, EFFECT) for size in (cheapest, even)]
        assert min(detects) >= TEST.power
        assert spent[0] <= spent[1]
    assert dearer[3] <= 1.01 and all(one > 1.1 for one in dearer[:3] + dearer[4:])


def cheapest_even(components: Components, seconds: tuple[float, float]) -> Size:
    """The smallest sizes that cost as much for E as for U and detect the effect."""
    low, high = 0.0, 1e9
    for _ in range(80):
        middle = (low + high) / 2
        size = power.even_split(components, seconds, middle)
        enough = size is not None and TEST.power_at(components, size, EFFECT) >= TEST.power
        low, high = (low, middle) if enough else (middle, high)
    size = power.even_split(components, seconds, high)
    assert size is not None
    return size

"""E from another law q than the policy: exact on average whatever q is, and a q that is recorded wrongly is caught.

The mean under q of an estimate is a finite sum over every response of a tiny policy, as in test_enumeration.
"""

import copy
from functools import cache
from typing import NamedTuple

import pytest
import torch
from conftest import World, gpt2, policy_of
from enumeration import (
    Direction,
    Everything,
    as_tokens,
    by_position,
    enumerate_world,
    every_batch,
    no_baseline,
    processor_of,
)
from torch import Tensor

from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Moved, MovedTokens, measured
from entropy_core.estimates.rows import change_of
from entropy_core.estimates.sampler import unusable
from entropy_core.numerics import importance, path_integral, philox, ragged, uncertainty
from entropy_core.numerics.choices import Baseline, Estimator, Normalization
from entropy_core.numerics.first_order import first_order_columns, score_coefficients
from entropy_core.numerics.functional import ENTROPY, FUNCTIONALS, LENGTH, TokenPair, Tokens
from entropy_core.numerics.philox import Purpose
from entropy_core.numerics.proposal import Proposal
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.weights import prefix_weights, sampling_weights
from entropy_core.policy import moves
from entropy_core.policy.derivatives import token_derivatives
from entropy_core.policy.model import Coefficients
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

EXACT = 1e-10
ETAS = (-0.5, 0.02, 2.0)


class Law(NamedTuple):
    """log q of every token, and the probability of every sequence with its prompt."""

    log_q_K: Tensor
    probability_N: Tensor


def law_of(everything: Everything, log_q_K: Tensor) -> Law:
    probability_N = ragged.sequence_sum(log_q_K, everything.offsets_N1).exp() / len(everything.world.prompts)
    return Law(log_q_K, probability_N)


def at_temperature(everything: Everything, temperature: float) -> Tensor:
    config = GenerationConfig(temperature, everything.world.max_new_tokens)
    scored, _ = SequenceProcessor(everything.world.policy, config).score(everything.sequences)
    return scored.logprobs_K


def in_bfloat16(everything: Everything) -> Tensor:
    """By the logits of the model in bfloat16, whose softmax in float64 is the law.

    One prefix at a time: the logits after a prefix depend a little on how many tokens are computed with it.
    """
    model = copy.deepcopy(everything.world.policy.model).to(torch.bfloat16)

    @cache
    def logits_after(*prefix: int) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([prefix])).logits[0, -1:]

    found = []
    for i in range(len(everything.sequences)):
        prompt, response = everything.sequences.prompt(i).tolist(), everything.sequences.response(i)
        logits_LV = torch.cat([logits_after(*prompt, *response[:t].tolist()) for t in range(len(response))])
        found.append(philox.token_logprobs(logits_LV, response, everything.world.temperature))
    return torch.cat(found)


def planted(everything: Everything) -> Tensor:
    """A law that knows nothing of the policy: the same at every step."""
    return torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()[everything.sequences.response_tokens_K]


@pytest.fixture(scope="module")
def everything(world: World, v: Direction) -> Everything:
    return enumerate_world(world, v)


@pytest.fixture(scope="module")
def laws(everything: Everything) -> dict[str, Law]:
    policy_K, broad_K = (at_temperature(everything, temperature) for temperature in (0.7, 2.0))
    mixture_K = Proposal(2.0, 0.5).logprobs(policy_K, broad_K, everything.offsets_N1)
    log_q = {"temperature": broad_K, "mixture": mixture_K, "bfloat16": in_bfloat16(everything)}
    return {name: law_of(everything, log_q_K) for name, log_q_K in (log_q | {"planted": planted(everything)}).items()}


LAWS = ("temperature", "mixture", "bfloat16", "planted")
each_law = pytest.mark.parametrize("name", LAWS)


def drawn_from(everything: Everything, law: Law) -> Tokens:
    return everything.block._replace(proposal_logprobs_K=law.log_q_K)


# --- exact on average ------------------------------------------------------------------------------------------------


@each_law
def test_every_law_sums_to_one_and_is_another_than_the_policy(everything: Everything, laws: dict[str, Law], name: str):
    assert float(laws[name].probability_N.sum()) == pytest.approx(1.0, abs=1e-12)
    far = (laws[name].log_q_K - everything.tokens.logprobs_K).abs().max()
    assert far > (1e-3 if name == "bfloat16" else 0.1)


@pytest.mark.parametrize("with_baseline", [False, True])
@each_law
def test_entropy_length_and_their_derivatives(
    everything: Everything, laws: dict[str, Law], name: str, with_baseline: bool
):
    law, world = laws[name], everything.world
    base, exact = (by_position if with_baseline else no_baseline)(everything), world.exact()
    for functional, of in ((ENTROPY, lambda at: at.H_seq), (LENGTH, lambda at: at.L)):
        columns = first_order_columns(functional, drawn_from(everything, law), base[functional])
        assert float(law.probability_N @ columns.total_N) == pytest.approx(of(exact).item(), abs=EXACT)
        expected = world.derivative(of, everything.v)
        assert float(law.probability_N @ columns.derivative_N) == pytest.approx(expected, abs=EXACT)


@each_law
def test_the_gradient(everything: Everything, laws: dict[str, Law], name: str):
    law, tokens = laws[name], drawn_from(everything, laws[name])
    probability_K = torch.repeat_interleave(law.probability_N, everything.sequences.lengths_N)
    before_K = sampling_weights(tokens).before_K
    coefficients = [
        Coefficients(
            probability_K * score_coefficients(f, tokens, "none"), f.slopes(tokens).entropy_K * before_K * probability_K
        )
        for f in (ENTROPY, LENGTH)
    ]
    policy = everything.world.policy
    found = [policy.new_accumulator() for _ in coefficients]
    for index_K, rows in processor_of(everything.world).micro_batches(everything.sequences):
        policy.add_gradients(rows, [Coefficients(*(c_K[index_K] for c_K in pair)) for pair in coefficients], 0.7, found)
    parameters = policy.named_parameters()
    for gradient, value in zip(found, everything.world.exact(), strict=True):
        expected = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
        for parameter, g in zip(parameters, expected, strict=True):
            torch.testing.assert_close(gradient[parameter], g, rtol=0, atol=EXACT)


@pytest.mark.parametrize("eta", ETAS)
@each_law
def test_the_moved_policy(everything: Everything, laws: dict[str, Law], name: str, eta: float):
    law, world, v, offsets_N1 = laws[name], everything.world, everything.v, everything.offsets_N1
    with moves.moved(world.policy, v, eta):
        columns = processor_of(world).map_tokens(
            everything.sequences, lambda rows: token_derivatives(world.policy, rows, v, world.temperature)
        )
        derivatives = {f: world.derivative(of, v) for f, of in ((ENTROPY, lambda a: a.H_seq), (LENGTH, lambda a: a.L))}
    moved = as_tokens(TokenDerivatives(*columns), offsets_N1)
    weights = prefix_weights(law.log_q_K, moved.logprobs_K, offsets_N1)
    exact = world.exact_at(v, eta)
    for base in (by_position(everything), no_baseline(everything)):
        for functional, value in ((ENTROPY, exact.H_seq), (LENGTH, exact.L)):
            terms_N = importance.per_decision_column(functional, moved, weights, base[functional])
            assert float(law.probability_N @ terms_N) == pytest.approx(value.item(), abs=EXACT)
            at_node = path_integral.derivative_columns(functional, moved, weights, base[functional])
            assert float(law.probability_N @ at_node.derivative_N) == pytest.approx(derivatives[functional], abs=EXACT)
    # the numerator and the denominator of whole-sequence weights
    totals_N = ragged.sequence_sum(moved.entropies_K, offsets_N1)
    assert float(law.probability_N @ (weights.sequence_N * totals_N)) == pytest.approx(exact.H_seq.item(), abs=EXACT)
    assert float(law.probability_N @ weights.sequence_N) == pytest.approx(1.0, abs=EXACT)


@pytest.mark.parametrize("baseline", ["time_loo", "time_loo_weighted", "ridge"])
def test_baselines_from_the_other_sequences_over_every_pair(baseline: Baseline):
    world = World(policy_of(gpt2(vocabulary=3)), [[1], [0, 2]], temperature=0.8, max_new_tokens=2)
    v = {name: torch.ones_like(p) / 10 for name, p in world.policy.named_parameters().items()}
    few = enumerate_world(world, v)
    log_q_K = at_temperature(few, 2.0)
    few = few._replace(probability_N=law_of(few, log_q_K).probability_N)
    means = dict.fromkeys(FUNCTIONALS, 0.0)
    for chosen_N, probability in every_batch(few, 2):
        pick_K, offsets_N1 = few.tokens_of(chosen_N)
        tokens = as_tokens(TokenDerivatives(*(x_K[pick_K] for x_K in few.tokens)), offsets_N1)
        tokens = tokens._replace(proposal_logprobs_K=log_q_K[pick_K])
        batch = EvaluationBatch.of([lambda tokens=tokens: tokens], None, baseline)
        for functional in FUNCTIONALS:
            means[functional] += probability * float(batch.columns[functional].derivative_N.mean())
    assert means[ENTROPY] == pytest.approx(world.derivative(lambda at: at.H_seq, v), abs=EXACT)
    assert means[LENGTH] == pytest.approx(world.derivative(lambda at: at.L, v), abs=EXACT)
    assert abs(means[ENTROPY]) > 1e-3


# --- a batch ---------------------------------------------------------------------------------------------------------


def batch_from(everything: Everything, law: Law | None, count: int = 40) -> tuple[EvaluationBatch, Everything, Tensor]:
    """A batch drawn from a law, or from the policy."""
    probability_N = everything.probability_N if law is None else law.probability_N
    chosen_N = torch.multinomial(probability_N, count, replacement=True, generator=torch.Generator().manual_seed(2))
    part, (pick_K, _) = everything.subset(chosen_N), everything.tokens_of(chosen_N)
    tokens = part.block if law is None else part.block._replace(proposal_logprobs_K=law.log_q_K[pick_K])
    return EvaluationBatch.of([lambda: tokens], None, "time_loo"), part, pick_K


@pytest.mark.parametrize("normalization", ["per_token", "per_sequence"])
@pytest.mark.parametrize("estimator", ["per_decision", "weighted_per_decision", "snis"])
def test_every_change_grows_as_its_derivative_says(
    everything: Everything, laws: dict[str, Law], estimator: Estimator, normalization: Normalization
):
    """Sequence by sequence."""
    batch, part, _ = batch_from(everything, laws["mixture"])
    step = 1e-5
    changes = []
    for eta in (step, -step):
        moved, _ = part.at(eta)
        there = Moved(eta, lambda moved=moved: [MovedTokens(moved.logprobs_K, moved.entropies_K)])
        changes.append(change_of(batch, measured(batch, there, estimator), eta, estimator, normalization))
    rise = changes[0].minus(changes[1]).scaled(1 / (2 * step))
    if estimator == "snis":
        derivative = uncertainty.snis_derivative(
            batch.unweighted_columns, batch.score_N, normalization, batch.sampling.weights_N
        )
    else:
        derivative = uncertainty.entropy_derivative(batch.value_columns(estimator), normalization)
    assert rise.value == pytest.approx(derivative.value, rel=1e-6)
    torch.testing.assert_close(rise.influence_N, derivative.influence_N, rtol=1e-5, atol=1e-7)
    assert abs(changes[0].value + changes[1].value) < 1e-3 * abs(changes[0].value)  # nothing changes at 0


def test_weighted_totals_of_blocks_are_those_of_all_sequences(everything: Everything, laws: dict[str, Law]):
    batch, _, _ = batch_from(everything, laws["temperature"])
    ((tokens, _),) = batch.read()
    cut = int(tokens.offsets_N1[15])
    rest = Tokens(
        tokens.logprobs_K[cut:],
        tokens.entropies_K[cut:],
        tokens.offsets_N1[15:] - cut,
        TokenPair(*(x_K[cut:] for x_K in tokens.derivative)),
        tokens.drawn_logprobs_K[cut:],
    )
    halves = EvaluationBatch.of([lambda: tokens.first(15), lambda: rest], None, "time_loo")
    for functional in FUNCTIONALS:
        for name in ("columns", "weighted_columns", "unweighted_columns"):
            pairs = zip(getattr(halves, name)[functional], getattr(batch, name)[functional], strict=True)
            for found_N, expected_N in pairs:
                torch.testing.assert_close(found_N, expected_N, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(halves.sampling.weights_N, batch.sampling.weights_N)
    assert halves.sampling.ess_prefix == pytest.approx(batch.sampling.ess_prefix)
    assert halves.sampling.tokens == batch.sampling.tokens


def test_the_policy_as_its_own_proposal_changes_no_bit(everything: Everything):
    own = Law(everything.tokens.logprobs_K, everything.probability_N)
    (plain, *_), (recorded, *_) = batch_from(everything, None), batch_from(everything, own)
    assert not plain.from_proposal and recorded.from_proposal
    assert torch.equal(recorded.sampling.weights_N, torch.ones(40).double()) and recorded.sampling.ess_prefix == 40
    for functional in FUNCTIONALS:
        for found_N, expected_N in zip(recorded.columns[functional], plain.columns[functional], strict=True):
            assert torch.equal(found_N, expected_N)
        values_N = ragged.sequence_sum(
            functional.values(next(iter(plain.read()))[0]), next(iter(plain.read()))[0].offsets_N1
        )
        assert torch.equal(plain.columns[functional].total_N, values_N)


# --- the samplers ----------------------------------------------------------------------------------------------------


def sampled(world: World, proposal: Proposal | None, count: int = 600, **config):
    how = GenerationConfig(world.temperature, world.max_new_tokens, proposal=proposal, **config)
    return SequenceProcessor(world.policy, how).generate_with_replacement_sampling(world.prompts, count, seed=3)


def test_what_is_recorded_is_the_law_that_was_drawn_from(everything: Everything):
    proposal, world = Proposal(2.0, 0.5), everything.world
    found = sampled(world, proposal)
    config = GenerationConfig(2.0, world.max_new_tokens)
    policy_K = processor_of(world).score(found)[0].logprobs_K
    broad_K = SequenceProcessor(world.policy, config).score(found)[0].logprobs_K
    expected_K = proposal.logprobs(policy_K, broad_K, found.response_offsets_N1)
    assert found.proposal_logprobs_K is not None
    torch.testing.assert_close(found.proposal_logprobs_K, expected_K, rtol=0, atol=1e-12)
    # the law of the mixture is a mixture of responses, not of tokens
    whole_N = [ragged.sequence_sum(x_K, found.response_offsets_N1).exp() for x_K in (expected_K, policy_K, broad_K)]
    torch.testing.assert_close(whole_N[0], 0.5 * whole_N[1] + 0.5 * whole_N[2], rtol=1e-12, atol=0)
    weights_N = prefix_weights(expected_K, policy_K, found.response_offsets_N1).sequence_N
    assert float(weights_N.max()) <= 2.0 + 1e-12


def test_sampled_frequencies_are_those_of_the_mixture(everything: Everything, laws: dict[str, Law]):
    found, sequences = sampled(everything.world, Proposal(2.0, 0.5), 20_000), everything.sequences
    place = {(int(sequences.prompt_ids_N[i]), *sequences.response(i).tolist()): i for i in range(len(sequences))}
    drawn_N = torch.tensor([place[int(found.prompt_ids_N[i]), *found.response(i).tolist()] for i in range(len(found))])
    count_N, expected_N = torch.bincount(drawn_N, minlength=len(sequences)), 20_000 * laws["mixture"].probability_N
    often_N = expected_N > 20
    z_N = ((count_N - expected_N) / expected_N.sqrt())[often_N]
    assert int(often_N.sum()) > 60 and float(z_N.square().mean()) == pytest.approx(1.0, abs=0.35)


def test_draws_do_not_depend_on_the_batch_and_larger_batches_begin_with_smaller(everything: Everything):
    proposal = Proposal(2.0, 0.5)
    many, few = sampled(everything.world, proposal, 60, gen_batch_size=7), sampled(everything.world, proposal, 25)
    length = int(few.response_offsets_N1[-1])
    assert torch.equal(many.response_tokens_K[:length], few.response_tokens_K)
    torch.testing.assert_close(many.proposal_logprobs_K[:length], few.proposal_logprobs_K, rtol=0, atol=1e-12)
    chosen_N = torch.tensor([5, 0, 17])
    part = many.select(chosen_N)
    expected = torch.cat(
        [many.proposal_logprobs_K[many.response_offsets_N1[i] : many.response_offsets_N1[i + 1]] for i in chosen_N]
    )
    assert torch.equal(part.proposal_logprobs_K, expected)


def test_without_a_proposal_nothing_is_recorded_and_with_share_zero_the_draws_are_the_same(everything: Everything):
    plain, recorded = sampled(everything.world, None, 80), sampled(everything.world, Proposal(1.0, 0.0), 80)
    assert plain.proposal_logprobs_K is None and torch.equal(plain.response_tokens_K, recorded.response_tokens_K)
    scored_K = processor_of(everything.world).score(plain)[0].logprobs_K
    torch.testing.assert_close(recorded.proposal_logprobs_K, scored_K, rtol=0, atol=1e-12)


def test_a_policy_in_bfloat16_records_the_law_of_its_own_logits(everything: Everything):
    world = everything.world
    narrow = World(policy_of(copy.deepcopy(world.policy.model).to(torch.bfloat16)), *world[1:])
    found = sampled(narrow, Proposal(world.temperature, 0.0), 300)
    scored_K = processor_of(world).score(found)[0].logprobs_K
    difference_K = (found.proposal_logprobs_K - scored_K).abs()
    assert 1e-3 < float(difference_K.max()) < 0.2
    weights_N = prefix_weights(found.proposal_logprobs_K, scored_K, found.response_offsets_N1).sequence_N
    assert float(weights_N.mean()) == pytest.approx(1.0, abs=4 * float(weights_N.std()) / 300**0.5)
    assert float(weights_N.std()) > 1e-3


def test_weights_that_are_too_uneven_or_wrong_are_said():
    row = {"sampler": "proposal", "sampler_ess_fraction": 0.5}
    row |= {"mean_weight_z": 4.0, "mean_score_z": -4.0, "mean_surprisal_z": 0.0}
    assert unusable(row) == ""
    assert unusable(row | {"sampler_ess_fraction": 0.49}).startswith("the weights of E are too uneven (ESS/N = 0.49)")
    assert "the mean weight is 7 SE from 1)" in unusable(row | {"mean_weight_z": -7.0})
    both = unusable(row | {"mean_score_z": 5.0, "mean_surprisal_z": 9.0})
    assert "the mean score is 5 SE from 0 and the mean surprisal is 9 SE from the entropy" in both
    assert unusable(row | {"sampler": "policy", "mean_score_z": 5.0}) == ""


def test_the_component_of_a_response_has_a_stream_of_its_own():
    ids_N = torch.arange(1000)
    streams = [philox.uniforms(3, purpose, ids_N) for purpose in Purpose]
    correlations = torch.corrcoef(torch.stack(streams)) - torch.eye(len(Purpose))
    assert float(correlations.abs().max()) < 0.12

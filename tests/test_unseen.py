"""What E has not seen: the probability of tokens that it never took, at the states that it visited."""

from collections import defaultdict

import pytest
import torch
from conftest import World
from enumeration import Direction, Everything, enumerate_world
from test_proposals import at_temperature, law_of

from entropy_core.estimates.unseen import cannot_know, describe_unseen
from entropy_core.numerics import ragged
from entropy_core.numerics.unseen import Steps, Unseen, states, states_before, unseen
from entropy_core.numerics.weights import prefix_weights


@pytest.fixture(scope="module")
def everything(world: World, v: Direction) -> Everything:
    return enumerate_world(world, v)


def steps_of(batch: Everything, log_q_K: torch.Tensor) -> Steps:
    sequences, offsets_N1 = batch.sequences, batch.offsets_N1
    after_K = states(sequences.prompt_ids_N, sequences.response_tokens_K, offsets_N1)
    before_K = states_before(sequences.prompt_ids_N, after_K, offsets_N1)
    weights_K = prefix_weights(log_q_K, batch.tokens.logprobs_K, offsets_N1).before_K
    left_K = batch.world.max_new_tokens - 1 - ragged.position_index(offsets_N1)
    return Steps(before_K, after_K, batch.tokens.logprobs_K, log_q_K, weights_K, left_K)


def by_hand(batch: Everything, log_q_K: torch.Tensor) -> Unseen:
    """Prefix by prefix, with dictionaries."""
    taken: dict[tuple[int, ...], dict[int, tuple[float, float]]] = defaultdict(dict)
    visits, sequences = [], batch.sequences
    for i in range(len(sequences)):
        first, weight = int(batch.offsets_N1[i]), 1.0
        tokens = sequences.response(i).tolist()
        for k, token in enumerate(tokens):
            state = (int(sequences.prompt_ids_N[i]), *tokens[:k])
            p, q = (float(x_K[first + k].exp()) for x_K in (batch.tokens.logprobs_K, log_q_K))
            taken[state][token] = p, q
            left = batch.world.max_new_tokens - k - 1
            visits.append((state, weight, left))
            weight *= p / q
    rest = {state: [1 - sum(of) for of in zip(*tokens.values(), strict=True)] for state, tokens in taken.items()}
    return Unseen(
        sum(w * rest[state][0] for state, w, left in visits if left),
        sum(rest[state][1] for state, _, left in visits if left),
        sum(w * rest[state][0] * left for state, w, left in visits),
    )


def test_it_is_the_sum_over_every_prefix(everything: Everything):
    broad_K = at_temperature(everything, 2.0)
    everything = everything._replace(probability_N=law_of(everything, broad_K).probability_N)
    chosen_N = torch.multinomial(everything.probability_N, 50, replacement=True)
    batch, (pick_K, _) = everything.subset(chosen_N), everything.tokens_of(chosen_N)
    steps, expected = steps_of(batch, broad_K[pick_K]), by_hand(batch, broad_K[pick_K])
    assert unseen(steps) == pytest.approx(tuple(expected), rel=1e-10)
    parts = [Steps(*(x_K[steps.before_K % 3 == part] for x_K in steps)) for part in range(3)]
    assert unseen(parts[0]).plus(unseen(parts[1])).plus(unseen(parts[2])) == pytest.approx(tuple(expected), rel=1e-10)
    assert expected.probability > 1 and abs(expected.probability / expected.expected - 1) > 0.01


def test_nothing_is_unseen_where_every_response_was_met(everything: Everything):
    found = unseen(steps_of(everything, everything.tokens.logprobs_K))
    assert max(found) < 1e-9


def test_a_state_is_its_prompt_and_its_tokens(everything: Everything):
    prompts_N, offsets_N1 = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 2, 4, 6, 7])
    after_K = states(prompts_N, torch.tensor([3, 3, 3, 0, 3, 3, 3]), offsets_N1)
    before_K = states_before(prompts_N, after_K, offsets_N1)
    assert int(after_K[0]) == int(after_K[2]) == int(after_K[6]) == int(before_K[1]) == int(before_K[3])
    assert len({*after_K.tolist(), *before_K.tolist()}) == 7  # two roots; 3 twice; 33 twice, once each; and 30
    assert int(before_K[0]) == int(before_K[2]) == int(before_K[6]) != int(before_K[4])


def test_only_rare_departures_that_could_matter_are_said():
    def reason(probability: float, expected: float, sequences: int = 256, entropy: float = 1.0, left: int = 100) -> str:
        row = describe_unseen(Unseen(probability, expected, left * probability), sequences, entropy, 4.0)
        assert row["unseen_share"] == probability / sequences
        return cannot_know(row, sequences)

    assert reason(0.26, 0.26).startswith("E cannot know what follows tokens that it never took: 0.001 of the responses")
    assert reason(0.26, 30.0) == ""  # what drew E makes enough of them
    assert reason(30.0, 30.0) == ""  # common enough
    assert reason(1e-5, 1e-5) == ""  # too rare to matter
    assert reason(0.26, 0.26, entropy=100.0) == ""
    assert reason(0.26, 0.26, left=1) == ""  # near the end of a response, where little can follow
    assert reason(15.0, 15.0, sequences=16) == ""  # a small E, each of whose responses departs from the others
    assert reason(15.0, 15.0, sequences=4096) != ""
    assert reason(0.0, 0.0, entropy=0.0) == ""

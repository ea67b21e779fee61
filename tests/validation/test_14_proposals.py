"""Intervals from an E that another law drew, over the effective sample size of its weights."""

import pytest
import torch
from conftest import World, gpt2, policy_of, random_direction
from enumeration import enumerate_world
from proofs import Proof, percent
from scipy.stats import t as student
from torch import Tensor

from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.measurement import Moved, MovedTokens, measured
from entropy_core.estimates.rows import change_of
from entropy_core.numerics import importance, ragged, uncertainty
from entropy_core.numerics.functional import ENTROPY, LENGTH
from entropy_core.numerics.proposal import Proposal
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

pytestmark = pytest.mark.validate

TEMPERATURE, E_SIZE, SWEEPS, ETA = 0.25, 256, 600, 0.3
LAWS = [(factor, share) for factor in (1.5, 2.5, 5.0) for share in (1.0, 0.5, 0.8)]


def test_intervals_from_a_proposal(record: Proof):
    record(
        "E from a proposal",
        claim=f"{SWEEPS} E batches of {E_SIZE} responses of an enumerable policy for each law, and whether the 95 % "
        f"intervals hold the exact H_tok, its derivative and ΔH at η = {ETA:g}. The law is a mixture of the policy "
        "and of itself at a multiple of its temperature; with a share of 1 the weights have no bound.",
        limit="92 to 98 % for every mixture (three standard errors of the simulation); none at a share of 1",
        columns=("temperature", "share", "ESS/N", "smallest prefix ESS/N", "covers H", "covers ∂H", "covers ΔH"),
    )
    world = World(policy_of(gpt2()), [[1], [2, 0], [3, 1, 0, 2]], TEMPERATURE, 5)
    everything = enumerate_world(world, random_direction(world.policy))
    v, exact = everything.v, world.exact().H_tok.item()
    slope, change = world.derivative(lambda at: at.H_tok, v), world.exact_at(v, ETA).H_tok.item() - exact
    moved, _ = everything.at(ETA)
    generator, quantile = torch.Generator().manual_seed(3), float(student.ppf(0.975, E_SIZE - 1))

    def one(log_q_K: Tensor) -> list[float]:
        probability_N = ragged.sequence_sum(log_q_K, everything.offsets_N1).exp()
        chosen_N = torch.multinomial(probability_N, E_SIZE, replacement=True, generator=generator)
        pick_K, _ = everything.tokens_of(chosen_N)
        tokens = everything.subset(chosen_N).block._replace(proposal_logprobs_K=log_q_K[pick_K])
        batch = EvaluationBatch.of([lambda: tokens], None, "time_loo")
        there = Moved(ETA, lambda: [MovedTokens(moved.logprobs_K[pick_K], moved.entropies_K[pick_K])])
        terms = measured(batch, there, "per_decision")
        estimates = (
            (uncertainty.entropy(*(batch.columns[f].total_N for f in (ENTROPY, LENGTH)), "per_token"), exact),
            (uncertainty.entropy_derivative(batch.columns, "per_token"), slope),
            (change_of(batch, terms, ETA, "per_decision", "per_token"), change),
        )
        covered = [abs(found.value - of) <= quantile * batch.standard_error(found) for found, of in estimates]
        ess = importance.effective_sample_size(batch.sampling.weights_N)
        return [ess / E_SIZE, batch.sampling.ess_prefix / E_SIZE, *map(float, covered)]

    held = []
    for factor, share in LAWS:
        config = GenerationConfig(factor * TEMPERATURE, world.max_new_tokens)
        broad_K = SequenceProcessor(world.policy, config).score(everything.sequences)[0].logprobs_K
        proposal = Proposal(factor * TEMPERATURE, share)
        log_q_K = proposal.logprobs(everything.tokens.logprobs_K, broad_K, everything.offsets_N1)
        ess, ess_prefix, *covers = torch.tensor([one(log_q_K) for _ in range(SWEEPS)]).mean(0).tolist()
        record.row(f"× {factor:g}", f"{share:g}", f"{ess:.2f}", f"{ess_prefix:.2f}", *(percent(x) for x in covers))
        held += [0.92 <= x <= 0.98 for x in covers] if share < 1 else []
    assert len(held) == 18 and all(held)

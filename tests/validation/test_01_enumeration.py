"""What the estimators give on average, as a finite sum over every response; and what the first order leaves out."""

from collections.abc import Iterator
from typing import NamedTuple, get_args

import pytest
import torch
from conftest import World, gpt2, llama, llama64, policy_of, random_direction
from enumeration import (
    Everything,
    by_position,
    enumerate_world,
    evaluation_batch,
    every_batch,
    no_baseline,
    per_decision,
    taken,
)
from proofs import Proof, power
from torch import Tensor

from entropy_core.numerics import ragged
from entropy_core.numerics.choices import Baseline
from entropy_core.numerics.functional import ENTROPY, LENGTH
from entropy_core.numerics.token_statistics import TokenDerivatives

pytestmark = pytest.mark.validate

EXACT = 1e-10
CASTS = 1e-6  # what norms, rotary embeddings and softmax in float32 may cost
ETAS = (-0.5, 0.02, 0.3, 2.0)
BASELINES = tuple(baseline for baseline in get_args(Baseline) if baseline != "none")
MODELS = {"GPT-2": gpt2, "Llama": llama64, "Llama as it comes": llama}


class Mean(NamedTuple):
    """Of an estimator over its law, and what it estimates."""

    name: str
    found: float
    exact: float


def everything_of(model, **options) -> Everything:
    """Three prompts, one of them with an EOS in it; every response of at most four tokens."""
    world = World(policy_of(model), [[1], [2, 0], [3, 1, 0, 2]], temperature=0.7, max_new_tokens=4)
    return enumerate_world(world, random_direction(world.policy))


def few_of(model) -> Everything:
    """Three prompts and 21 sequences, so that every batch of three can be gone through."""
    world = World(policy_of(model), [[1], [0, 2], [2, 0, 1]], temperature=0.8, max_new_tokens=2)
    return enumerate_world(world, random_direction(world.policy))


def at_theta(everything: Everything) -> Iterator[Mean]:
    world, v, mean, columns = everything.world, everything.v, everything.mean, everything.columns("none")
    exact = world.exact()
    dH_seq, dL, dH_tok = (
        world.derivative(lambda at, name=name: getattr(at, name), v) for name in ("H_seq", "L", "H_tok")
    )
    (S_N, x_N, local_N), (T_N, y_N, _) = columns[ENTROPY], columns[LENGTH]
    S, L, X, Y = (mean(column_N) for column_N in (S_N, T_N, x_N, y_N))
    yield Mean("Σ_k h_k, against Shannon's entropy of the responses", S, exact.H_seq.item())
    yield Mean("length", L, exact.L.item())
    yield Mean("∂_vH_seq", X, dH_seq)
    yield Mean("∂_vL", Y, dL)
    yield Mean("∂_vH_tok, from the means", (X - S / L * Y) / L, dH_tok)
    score_N = ragged.sequence_sum(everything.tokens.dlogprobs_K, everything.offsets_N1)
    X = mean(score_N * S_N + local_N)
    yield Mean("snis: its derivative, per sequence", X, dH_seq)
    yield Mean("snis: its derivative, per token, from the means", (X - S / L * mean(score_N * T_N)) / L, dH_tok)


def at_eta(everything: Everything) -> Iterator[Mean]:
    for eta in ETAS:
        at_eta, there = everything.at(eta), everything.world.exact_at(everything.v, eta)
        for name, bases in (("no baseline", no_baseline(everything)), ("baseline", by_position(everything))):
            moved = per_decision(at_eta, bases)
            label = f"per_decision, η = {eta:g}, {name}"
            yield Mean(f"{label}: H_seq(θ + ηv)", everything.mean(moved.S_N), there.H_seq.item())
            yield Mean(f"{label}: L(θ + ηv)", everything.mean(moved.T_N), there.L.item())


def over_batches(few: Everything) -> Iterator[Mean]:
    """A baseline from the other sequences of the batch: the mean is over batches, not over sequences."""
    world, v, eta = few.world, few.v, 0.7
    dH_seq, dL = (world.derivative(lambda at, name=name: getattr(at, name), v) for name in ("H_seq", "L"))
    at_eta, there = few.at(eta), world.exact_at(v, eta)
    for baseline in BASELINES:
        X = Y = S = T = 0.0
        for chosen_N, probability in every_batch(few, 3):
            pick_K, offsets_N1 = few.tokens_of(chosen_N)
            batch = evaluation_batch(TokenDerivatives(*(x_K[pick_K] for x_K in few.tokens)), offsets_N1, baseline)
            ((_, bases),) = batch.read()
            moved = per_decision(taken(*at_eta, chosen_N, pick_K, offsets_N1), dict(bases))
            x, y = (float(batch.columns[functional].derivative_N.mean()) for functional in (ENTROPY, LENGTH))
            X, Y = X + probability * x, Y + probability * y
            S, T = S + probability * float(moved.S_N.mean()), T + probability * float(moved.T_N.mean())
        yield Mean(f"{baseline}, every batch of 3: ∂_vH_seq", X, dH_seq)
        yield Mean(f"{baseline}, every batch of 3: ∂_vL", Y, dL)
        yield Mean(f"{baseline}, every batch of 3, per_decision, η = {eta:g}: H_seq(θ + ηv)", S, there.H_seq.item())
        yield Mean(f"{baseline}, every batch of 3, per_decision, η = {eta:g}: L(θ + ηv)", T, there.L.item())


def test_every_unbiased_estimator_has_the_exact_mean(record: Proof):
    record(
        "Unbiasedness, by enumeration",
        claim="The mean of every unbiased estimator, summed over every response of a tiny policy (or over every "
        "batch) with its probability, is the exact value: no sampling. Three prompts, an EOS possible at every step. "
        "The exact values are Shannon's entropy of the law of whole responses and its derivative in reverse mode; the "
        "estimators go through padded micro-batches and forward mode.",
        limit=f"|error| < {EXACT:g}; Llama as transformers computes it, with float32 inside, {CASTS:g}",
        columns=("mean of", "exact, GPT-2", "error", "exact, Llama", "error", "error, Llama as it comes"),
    )
    found: list[list[Mean]] = []
    for name, model in MODELS.items():
        means = [*at_theta(everything_of(model())), *at_eta(everything_of(model()))]
        if name != "Llama as it comes":
            means += over_batches(few_of(model(vocab_size=3, eos_token_id=2)))
        found.append(means)
    exact, casts = found[:2], found[2]
    casts = casts + [None] * (len(exact[0]) - len(casts))
    for gpt2_mean, llama_mean, stock_mean in zip(*exact, casts, strict=True):
        cells = [cell for mean in (gpt2_mean, llama_mean) for cell in (f"{mean.exact:.6f}", power(error(mean)))]
        record.row(gpt2_mean.name, *cells, power(error(stock_mean)) if stock_mean else "")
    record.note("The Llama policy is transformers' own with its norms, rotary embeddings and softmax in float64.")
    for means, limit in zip(found, (EXACT, EXACT, CASTS), strict=True):
        assert len(means) >= 23
        for mean in means:
            assert error(mean) < limit, mean
    at_zero, moved = (next(mean for mean in found[0] if key in mean.name).exact for key in ("Shannon", "η = 2"))
    assert abs(moved - at_zero) > 0.01  # the policy does move


def error(mean: Mean) -> float:
    return abs(mean.found - mean.exact)


def test_the_first_order_leaves_out_the_second(record: Proof):
    record(
        "What the first order leaves out",
        claim="|ΔH − δH₁| falls as η²: both exact, by enumeration, along a direction of length 1, at seven step sizes "
        "of each range.",
        limit="log-log slope 2.00 ± 0.05 for η from 1e-4 to 3.2e-3; over larger steps, where the third order begins "
        "to show, none",
        columns=(
            "policy",
            "normalisation",
            "∂_vH",
            "|ΔH − δH₁| at η = 1e-4",
            "at 3.2e-3",
            "slope",
            "slope, 1e-3 … 3.2e-2",
        ),
    )
    slopes = []
    for name in ("GPT-2", "Llama"):
        everything = everything_of(MODELS[name]())
        world, v = everything.world, everything.v
        for normalization, of in (("per_token", lambda at: at.H_tok), ("per_sequence", lambda at: at.H_seq)):
            derivative, at_zero = world.derivative(of, v), of(world.exact()).item()
            etas = torch.logspace(-4, -1.5, 11, dtype=torch.float64)
            left = torch.tensor([of(world.exact_at(v, eta)).item() for eta in etas.tolist()], dtype=torch.float64)
            left = (left - at_zero - etas * derivative).abs()
            slopes.append(log_slope(etas[:7], left[:7]))
            sizes = power(float(left[0])), power(float(left[6]))
            record.row(
                name, normalization, derivative, *sizes, f"{slopes[-1]:.4f}", f"{log_slope(etas[4:], left[4:]):.4f}"
            )
    assert len(slopes) == 4
    assert all(abs(slope - 2.0) <= 0.05 for slope in slopes), slopes


def log_slope(x: Tensor, y: Tensor) -> float:
    """Least squares, of log y on log x."""
    x, y = x.log(), y.log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())

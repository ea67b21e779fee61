"""Steps so small that a difference of two forward passes is only rounding, and where that begins."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World, gpt2, llama, llama64, policy_of, random_direction
from enumeration import Everything, as_tokens, enumerate_world, no_baseline, per_decision, processor_of
from pipeline_fixtures import probe, skip_figures
from proofs import Proof, power

from entropy_core.numerics import path_integral
from entropy_core.numerics.functional import ENTROPY, LENGTH
from entropy_core.numerics.quadrature import NODES, WEIGHTS
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.weights import prefix_weights
from entropy_core.policy import moves
from entropy_core.policy.derivatives import token_derivatives

pytestmark = pytest.mark.validate

ROOT = Path(__file__).resolve().parents[2]


# --- enumeration -----------------------------------------------------------------------------------------------------

ENUMERATED_ETA, RELATIVE = 1e-9, 1e-5


def worlds() -> Iterator[tuple[str, World, World]]:
    """Tiny policies in float64 throughout, and the same weights in float32."""
    rest = ([[1], [2, 0], [3, 1, 0]], 1.3, 3)
    for name, wide, narrow in (("GPT-2", gpt2(), gpt2()), ("Llama", llama64(), llama())):
        yield name, World(policy_of(wide), *rest), World(policy_of(narrow.float()), *rest)


def by_path(everything: Everything, eta: float) -> tuple[float, float]:
    """ΔH_seq and ΔH_tok by the path integral, its sample means replaced by sums over all responses."""
    world, offsets_N1 = everything.world, everything.offsets_N1
    seq = tok = 0.0
    for node, weight in zip(NODES, WEIGHTS, strict=True):
        with moves.moved(world.policy, everything.v, node * eta):
            columns = processor_of(world).map_tokens(
                everything.sequences,
                lambda rows: token_derivatives(world.policy, rows, everything.v, world.temperature),
            )
        moved = TokenDerivatives(*columns)
        weights = prefix_weights(everything.tokens.logprobs_K, moved.logprobs_K, offsets_N1)
        there, bases = as_tokens(moved, offsets_N1), no_baseline(everything)
        (S_N, x_N, _), (T_N, y_N, _) = (
            path_integral.derivative_columns(f, there, weights, bases[f]) for f in (ENTROPY, LENGTH)
        )
        x, y, S, T = (everything.mean(c_N) for c_N in (x_N, y_N, S_N, T_N))
        seq += eta * weight * x
        tok += eta * weight * (x - S / T * y) / T
    return seq, tok


def by_difference(everything: Everything, eta: float) -> tuple[float, float]:
    """The same as a difference of `per_decision` at η and at 0."""
    moved, here = per_decision(everything.at(eta), no_baseline(everything)), everything.columns("none")
    S, T = (everything.mean(here[functional].total_N) for functional in (ENTROPY, LENGTH))
    S_moved, T_moved = map(everything.mean, moved)
    return S_moved - S, S_moved / T_moved - S / T


def test_the_path_integral_at_the_smallest_steps(record: Proof):
    record(
        "Path integral in float32",
        claim="ΔH at η = 1e-9 by every response of a tiny policy whose passes are float32, against the enumerated "
        "value, η·∂_vH, from which the exact ΔH differs by a part in 1e-8. The plain difference of passes is noise.",
        limit=f"path_integral within {RELATIVE:g} relative; the plain difference is not",
        columns=("policy", "exact ΔH", "path_integral", "relative error", "plain difference", "relative error"),
    )
    wrong = []
    for name, world, in_float32 in worlds():
        v = random_direction(world.policy)
        narrow = enumerate_world(in_float32, {parameter: t.float() for parameter, t in v.items()})
        narrow = narrow._replace(probability_N=enumerate_world(world, v).probability_N)
        exact = [
            ENUMERATED_ETA * world.derivative(lambda e, what=what: getattr(e, what), v) for what in ("H_seq", "H_tok")
        ]
        integrals, differences = by_path(narrow, ENUMERATED_ETA), by_difference(narrow, ENUMERATED_ETA)
        for what, truth, integral, difference in zip(("H_seq", "H_tok"), exact, integrals, differences, strict=True):
            errors = [abs(found / truth - 1) for found in (integral, difference)]
            cells = (f"{integral:.9e}", power(errors[0]), f"{difference:.3e}", power(errors[1]))
            record.row(f"{name}, {what}", f"{truth:.9e}", *cells)
            wrong += [name] * (errors[0] > RELATIVE or errors[1] <= RELATIVE)
    assert not wrong


# --- the demo policy -------------------------------------------------------------------------------------------------

ETAS = [10.0**exponent for exponent in range(-9, -2)]
UPDATES, SLOPE = 8, 0.005


def slope(points: list[tuple[float, float]]) -> float:
    """Of log|ΔH| against log η."""
    x, y = (torch.tensor([math.log(abs(value)) for value in column]).double() for column in zip(*points, strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def of_update(seed: int, artifacts: Path) -> list[dict[str, Any]]:
    """ΔH of one update at every step size, by both estimators."""
    asked = {
        "name": "small-steps",
        "checkpoints": [str(ROOT / "artifacts/demo-run/checkpoint-30")],
        "batch_config": {"E_total_sequences": 512, "B_U": 64, "G": 8, "U_batch_seed": seed},
        "generation": {"max_new_tokens": 32},
        "update": {"reward": "arithmetic"},
        "importance": {"etas": ETAS, "eta_unit": "absolute", "estimators": ["path_integral", "per_decision"]},
        "variance": {"normalizations": ["per_token"]},
        "execution": {"artifacts": str(artifacts)},
    }
    return probe(asked).rows


def test_the_change_is_linear_down_to_the_smallest_steps(
    record: Proof, demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    skip_figures(monkeypatch)
    record(
        "Linear down to η = 1e-9",
        claim=f"Slope of log|ΔH| against log η in float32, for {UPDATES} U batches of the demo policy on one E batch "
        "of 512, from the largest η with a curvature up to 5 % down to 1e-9. The plain difference, `per_decision`, "
        "is beside it; its relative distance from η·∂_vH shows where its noise begins.",
        limit=f"slope of path_integral 1 ± {SLOPE:g} for every U batch",
        columns=("U seed", "from η", "path_integral", "plain difference", *(f"off at {eta:.0e}" for eta in ETAS)),
    )
    slopes = []
    for seed in range(UPDATES):
        rows = of_update(seed, tmp_path / "artifacts")
        paths = {row["eta"]: row for row in rows if row["estimator"] == "path_integral"}
        plain = {row["eta"]: row for row in rows if row["estimator"] == "per_decision"}
        largest = max(eta for eta, row in paths.items() if abs(row["curvature"]) <= 0.05 * abs(row["delta_h1"]))
        kept = [eta for eta in paths if eta <= largest]
        found = [slope([(eta, of[eta]["delta_h"]) for eta in kept]) for of in (paths, plain)]
        off = [power(abs(row["delta_h"] / row["delta_h1"] - 1)) for row in plain.values()]
        record.row(seed, f"{largest:.0e}", f"{found[0]:.5f}", f"{found[1]:.3f}", *off)
        slopes.append(found[0])
    assert max(abs(found - 1) for found in slopes) <= SLOPE

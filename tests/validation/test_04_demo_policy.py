"""On the demo policy, with the sweep of configs/demo.yaml: attribution, noise of the estimators, cost."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, get_args

import pytest
import torch
from conftest import World, gpt2, llama64, policy_of, random_direction
from enumeration import enumerate_world, evaluation_batch
from pipeline_fixtures import Probe, probe
from proofs import Proof, power
from torch import Tensor

from entropy_core.config.read import load_config
from entropy_core.estimates.selection import at_learning_rate
from entropy_core.numerics import ragged
from entropy_core.numerics.choices import Baseline, Normalization
from entropy_core.numerics.functional import ENTROPY, LENGTH, Columns
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.uncertainty import entropy_derivative, snis_derivative, standard_error
from entropy_core.pipeline import catalogue as stage
from entropy_core.store.columns import read_tokens
from entropy_core.store.store import Store

pytestmark = pytest.mark.validate

ROOT = Path(__file__).resolve().parents[2]
DEFAULT: Baseline = "time_loo"
OTHERS = tuple(baseline for baseline in get_args(Baseline) if baseline not in (DEFAULT, "none"))
CLOSURE, SECONDS, SEQUENCES = 1e-6, 2.0, 4096


@pytest.fixture(scope="module")
def swept(demo_run: Path) -> Probe:
    """The demo sweep, in the store that `make sweep` uses; what is there is reused."""
    return probe(load_config(ROOT / "configs" / "demo.yaml").model_dump(mode="json"))


def variance_inputs(swept: Probe) -> list[dict[str, Any]]:
    """Of each checkpoint."""
    return [inputs for name, inputs, _ in swept.run.asked if name == "variance"]


# --- attribution -----------------------------------------------------------------------------------------------------


def test_the_attribution_adds_up(record: Proof, swept: Probe):
    record(
        "Closure of the attribution",
        claim="The shares of the U tokens, of momentum and of weight decay add up to ⟨∇H, v⟩, per checkpoint of the "
        "demo run; in nats, at η = the learning rate. Tokens are summed here from tokens.parquet.",
        limit=f"relative miss ≤ {CLOSURE:g}, as computed here and as results.parquet says",
        columns=(
            "checkpoint",
            "normalisation",
            "U tokens",
            "momentum",
            "decay",
            "⟨∇H, v⟩η",
            "miss here",
            "in the table",
        ),
    )
    tables = [artifact.table("tokens.parquet") for artifact in swept.run.artifacts("first-order-u")]
    rows = [row for row in at_learning_rate(swept.rows) if row["estimator"] == "per_decision"]
    checkpoints = dict(zip(dict.fromkeys(row["checkpoint"] for row in rows), tables, strict=True))
    misses = []
    for row in rows:
        share_K = torch.tensor(
            checkpoints[row["checkpoint"]][f"share_{row['normalization']}"].to_pylist(), dtype=torch.float64
        )
        parts = float(share_K.sum()) * row["eta"], row["delta_h1_momentum"], row["delta_h1_decay"]
        whole = row["inner_product"]
        misses.append((abs(whole - sum(parts)) / abs(whole), row["attribution_closure"]))
        record.row(row["checkpoint"], row["normalization"], *parts, whole, *map(power, misses[-1]))
    assert len(misses) == 2 * len(tables) >= 10
    assert all(miss <= CLOSURE for both in misses for miss in both), misses


# --- noise -----------------------------------------------------------------------------------------------------------


def alternatives(
    tokens: TokenDerivatives, offsets_N1: Tensor, normalization: Normalization
) -> tuple[float, dict[str, float]]:
    """The default's standard error on a batch, and how many times its variance each other estimator of ∂_vH has."""
    columns = {name: evaluation_batch(tokens, offsets_N1, name).columns for name in ("none", DEFAULT, *OTHERS)}
    none = columns.pop("none")
    logprob_N, score_N = (ragged.sequence_sum(x_K, offsets_N1) for x_K in (tokens.logprobs_K, tokens.dlogprobs_K))
    T_N = none[LENGTH].total_N
    plain = {
        ENTROPY: Columns(-logprob_N, -logprob_N * score_N, 0 * score_N),
        LENGTH: Columns(T_N, T_N * score_N, 0 * score_N),
    }
    estimates = {
        "score function": entropy_derivative(plain, normalization),
        "no baseline": entropy_derivative(none, normalization),
        "snis": snis_derivative(none, score_N, normalization),
    } | {baseline: entropy_derivative(of_baseline, normalization) for baseline, of_baseline in columns.items()}
    errors = {name: standard_error(estimate.influence_N) for name, estimate in estimates.items()}
    default = errors.pop(DEFAULT)
    return default, {name: (error / default) ** 2 for name, error in errors.items()}


def batches(swept: Probe) -> Iterator[tuple[str, TokenDerivatives, Tensor]]:
    """Columns along the direction of the step, on one E batch: of each demo checkpoint, and of the tiny policies."""
    names = list(dict.fromkeys(row["checkpoint"] for row in swept.rows))
    for name, inputs in zip(names, variance_inputs(swept), strict=True):
        scored = read_tokens(inputs["scores"], "logprobs", "entropies")
        table = scored.join(read_tokens(inputs["first_order_e"], "dlogprobs", "dentropies"))
        yield name, TokenDerivatives(*table.columns.values()), table.offsets_N1
    for name, model in (("tiny GPT-2, random v", gpt2), ("tiny Llama, random v", llama64)):
        world = World(policy_of(model()), [[1], [2, 0], [3, 1, 0, 2]], temperature=0.7, max_new_tokens=4)
        batch = enumerate_world(world, random_direction(world.policy)).drawn(2048)
        yield name, batch.tokens, batch.offsets_N1


def test_the_noise_of_the_alternatives(record: Proof, swept: Probe):
    record(
        "Variance against the alternatives",
        claim="Estimators of one ∂_vH on one E batch of 2,048 sequences: how many times the variance of the default "
        "each has. `score function`: −(Σℓ)(Σℓ̇), entropies from −Σℓ; `no baseline`: Rao-Blackwell without a baseline; "
        "`snis`: the derivative of whole-sequence weights.",
        limit="the least variance in every row is that of a baseline offered here; where it is not the default's, the "
        "text below says so",
        columns=(
            "policy",
            "normalisation",
            f"SE, {DEFAULT}",
            "score function",
            "no baseline",
            "snis",
            *OTHERS,
            "smallest",
        ),
    )
    smallest = []
    for name, tokens, offsets_N1 in batches(swept):
        assert len(offsets_N1) - 1 == 2048
        for normalization in get_args(Normalization):
            se, ratios = alternatives(tokens, offsets_N1, normalization)
            smallest.append(min(ratios | {DEFAULT: 1.0}, key=(ratios | {DEFAULT: 1.0}).__getitem__))
            record.row(name, normalization, f"{se:.3g}", *(f"{r:.3f}" for r in ratios.values()), smallest[-1])
    for name, rows in Counter(smallest).items():
        if name != DEFAULT:
            record.note(f"`{name}` has the least variance in {rows} of {len(smallest)} rows.")
    if set(smallest) != {DEFAULT}:
        record.note(
            f"`{DEFAULT}` subtracts the mean of what is to come, which does not depend on v, so that the one backward "
            "pass for ∇H can use it, too. What has the least variance for one v is the mean weighted by ℓ̇², and the "
            "others are made from it."
        )
    assert len(smallest) >= 14
    assert set(smallest) <= {DEFAULT, *OTHERS}, smallest


# --- cost ------------------------------------------------------------------------------------------------------------


def test_the_cost_of_the_variance_stage(record: Proof, swept: Probe, tmp_path: Path):
    record(
        "Cost of the statistics",
        claim=f"The stage `variance` on {SEQUENCES:,} cached sequences of the demo policy (its 2,048, twice), all step "
        "sizes, estimators and normalisations of configs/demo.yaml; each run in an empty store, reading included.",
        limit=f"median ≤ {SECONDS:g} s",
        columns=("checkpoint", "sequences", "tokens", "rows of results", "seconds, each run", "median"),
    )
    inputs = dict(variance_inputs(swept)[-1])
    for name in ("scores", "first_order_e"):
        inputs[name] = [*inputs[name], *inputs[name]]
    inputs["moved"] = [
        entry | {name: [*entry[name], *entry[name]] for name in ("shards", "path")} for entry in inputs["moved"]
    ]
    seconds = []
    for repetition in range(5):
        store = Store(tmp_path / str(repetition))
        started = time.perf_counter()
        artifact = store.run(stage.VARIANCE, swept.run.execution, inputs)
        seconds.append(time.perf_counter() - started)
    rows = artifact.table("estimates.parquet").to_pylist()
    tokens = read_tokens(inputs["scores"]).offsets_N1[-1]
    runs = ", ".join(f"{s:.2f}" for s in seconds)
    record.row(
        swept.rows[-1]["checkpoint"], rows[0]["n_sequences"], int(tokens), len(rows), runs, f"{median(seconds):.2f}"
    )
    assert {row["n_sequences"] for row in rows} == {SEQUENCES}
    assert median(seconds) <= SECONDS

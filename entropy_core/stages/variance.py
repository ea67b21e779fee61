"""variance: estimates with intervals, from cached per-token columns alone. No model, no parameter-sized file."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import torch

from entropy_core import diagnostics, estimates
from entropy_core.errors import NonFiniteError
from entropy_core.estimates import Contributions, EvaluationBatch, Moved, Row
from entropy_core.numerics import importance, uncertainty
from entropy_core.numerics.first_order import Baseline, ReturnsToGo
from entropy_core.numerics.path_integral import NODES
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.uncertainty import Normalization
from entropy_core.stages.columns import read_columns
from entropy_core.tables import ESTIMATES, TABLES, to_table

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution


def variance(
    out: "Writer",
    execution: "Execution",
    *,
    learning_rate: float,
    scores: "Sequence[Artifact]",
    rescores: "Sequence[Artifact]",
    first_order_e: "Sequence[Artifact]",
    first_order_u: "Artifact",
    update: "Artifact",
    scores_u: "Sequence[Artifact]",
    discriminators_u: "Artifact",
    calibration: "Artifact | None",
    moved: "Sequence[Mapping[str, Any]]",
    seed: int,
    replicates: "Sequence[Mapping[str, Any]]",
    estimators: Sequence[importance.Estimator],
    normalizations: Sequence[Normalization],
    baseline: Baseline,
    units: Literal["sequence", "prompt"],
    confidence_level: float,
    bootstrap_resamples: int,
) -> Row:
    """All estimates of one checkpoint.

    Args:
        out: `estimates.parquet` (a row per η, normalisation and estimator; schema `tables.ESTIMATES`), and the tables
            of `tables.TABLES`.
        execution: not used.
        learning_rate: nominal, to express η in.
        scores: the shards of score-e-batch.
        rescores: the draws of rescore-e-batch on the first sequences, for the numerical noise.
        first_order_e: the shards of first-order-e.
        first_order_u: artifact of first-order-u.
        update: artifact of compute-update; its summary and advantages are read.
        scores_u: the shards of score-u-batch.
        discriminators_u: artifact of discriminate-u.
        calibration: artifact of calibrate, where derivatives are central differences.
        moved: a mapping per step size: `eta`, the `shards` of importance and those of path-integral, `path`.
        seed: of E.
        replicates: a mapping per further E batch: its `seed`, `scores` and `first_order_e`.
        estimators: of ΔH.
        normalizations: of the entropy.
        baseline: of the reward-to-go.
        units: what is independent in E.
        confidence_level: of the intervals.
        bootstrap_resamples: of the bootstrap intervals.

    Returns:
        Number of rows of each table.

    Raises:
        NonFiniteError: a batch is too small for a standard error.
    """
    batch, of_batch = _read_batch(scores, first_order_e, baseline, units)
    rescored = [_read_moved({"eta": 1.0, "shards": [draw], "path": []}) for draw in rescores]
    at_eta = [_read_moved(entry) for entry in moved]
    batches = {seed: batch}
    for entry in replicates:
        batches[entry["seed"]], _ = _read_batch(entry["scores"], entry["first_order_e"], baseline, units)
    of_batch |= _describe_update(update.summary)
    of_batch |= {"derivative_check": calibration.summary["difference"] if calibration else None}
    by_literature = _by_literature(scores_u, discriminators_u, update)
    contributions = first_order_u.table("sequences.parquet")
    of_u = first_order_u.summary
    quantile = uncertainty.normal_quantile(confidence_level)
    rows: list[Row] = []
    tables: dict[str, list[Row]] = {name: [] for name in TABLES}

    def add(normalization: Normalization, **found: list[Row]) -> None:
        for name, of_table in found.items():
            tables[name] += [{"normalization": normalization} | row for row in of_table]

    for normalization in normalizations:
        derivative = estimates.derivative_of(
            batch,
            normalization,
            _contributions(contributions, normalization, of_batch["n_prompts_u"]),
            confidence_level,
            bootstrap_resamples,
        )
        of_normalization = of_batch | {
            "learning_rate": learning_rate,
            "normalization": normalization,
            "attribution_closure": of_u["closure"][normalization],
            "gradient_check": _gradient_check(batch, of_u, normalization),
            **diagnostics.describe_batch(batch, normalization),
            **diagnostics.describe_influence(derivative.estimate),
        }
        noise = diagnostics.numerical_noise(batch, rescored, normalization)
        for estimator in estimators:
            usable = {}
            for there in at_eta:
                eta = there.eta
                noise_floor = noise if eta and estimator != "path_integral" else 0.0
                change, weights = estimates.change_of(batch, there, estimator, normalization)
                row = {
                    "eta": eta,
                    "eta_over_lr": eta / learning_rate,
                    "estimator": estimator,
                    "inner_product": of_u["inner_product"][normalization] * eta,
                    "delta_h1_momentum": of_u["momentum"][normalization] * eta,
                    "delta_h1_decay": of_u["decay"][normalization] * eta,
                    "noise_floor": noise_floor,
                }
                row |= estimates.predict(derivative, eta, confidence_level)
                row |= estimates.measure(batch, change, weights, derivative, eta, estimator, noise_floor, quantile)
                rows.append(of_normalization | row)
                if row["verdict"] != "weights-unreliable":
                    usable[eta] = (change, noise_floor)
                if eta and estimator == estimators[0]:
                    add(normalization, predictors=diagnostics.predictor_rows(row, by_literature))
            fits, pairs = diagnostics.linearity_rows(batch, usable, derivative, estimator, learning_rate)
            add(normalization, linearity=fits, eta_pairs=pairs)
        add(normalization, replicates=diagnostics.replicate_rows(batches, normalization, learning_rate))
    _require_numbers(rows)
    out.table(to_table(rows, ESTIMATES), "estimates.parquet")
    for name, schema in TABLES.items():
        out.table(to_table(tables[name], schema), f"{name}.parquet")
    return {"rows": len(rows)} | {name: len(of_table) for name, of_table in tables.items()}


def _read_batch(
    scores: "Sequence[Artifact]", derivatives: "Sequence[Artifact]", baseline: Baseline, units: str
) -> tuple[EvaluationBatch, Row]:
    scored, offsets_N1 = read_columns(scores, "logprobs", "entropies")
    along_v, _ = read_columns(derivatives, "dlogprobs", "dentropies")
    tables = [shard.table("scores.parquet") for shard in scores]
    prompt_ids_N = torch.tensor([prompt for table in tables for prompt in table["prompt_id"].to_pylist()])
    reasons = [reason for table in tables for reason in table["finish_reason"].to_pylist()]
    nothing_K = torch.zeros_like(scored["entropies"], dtype=torch.float64)
    batch = EvaluationBatch(
        scored["logprobs"],
        scored["entropies"],
        along_v["dlogprobs"],
        along_v["dentropies"],
        offsets_N1,
        ReturnsToGo(nothing_K, nothing_K),
        prompt_ids_N if units == "prompt" else None,
    )
    described = {"n_sequences": len(reasons), "truncated_fraction": reasons.count("length") / len(reasons)}
    return batch.with_baseline(baseline), described


def _read_moved(entry: Mapping[str, Any]) -> Moved:
    at_nodes = []
    for j in range(len(NODES) if entry["path"] else 0):
        names = [f"{name.removesuffix('_K')}_{j}" for name in TokenDerivatives._fields]
        columns, _ = read_columns(entry["path"], *names)
        at_nodes.append(TokenDerivatives(*columns.values()))
    columns = read_columns(entry["shards"], "logprobs", "entropies")[0] if entry["shards"] else {}
    return Moved(entry["eta"], columns.get("logprobs"), columns.get("entropies"), tuple(at_nodes))


def _contributions(of_sequences: pa.Table, normalization: Normalization, prompts: int) -> Contributions:
    whole, *halves = (
        torch.tensor(of_sequences[f"influence_{normalization}{suffix}"].to_pylist(), dtype=torch.float64)
        for suffix in ("", "_half_0", "_half_1")
    )
    return Contributions(whole.view(prompts, -1), torch.stack(halves).view(2, prompts, -1))


def _by_literature(
    scores_u: "Sequence[Artifact]", discriminators_u: "Artifact", update: "Artifact"
) -> dict[str, float]:
    scored, offsets_N1 = read_columns(scores_u, "logprobs", "entropies")
    expected, _ = read_columns([discriminators_u], "expected")
    advantages_N = torch.tensor(update.table("sequences.parquet")["advantage"].to_pylist(), dtype=torch.float64)
    return diagnostics.predicted_changes(
        scored["logprobs"], scored["entropies"], expected["expected"], advantages_N, offsets_N1
    )


def _describe_update(summary: Mapping[str, Any]) -> Row:
    prompts = summary["prompts"]
    return {name: summary[name] for name in ("gradient_norm", "clip_factor", "update_norm", "mean_reward")} | {
        "n_prompts_u": prompts,
        "equal_reward_fraction": summary["prompts_with_equal_rewards"] / prompts,
    }


def _gradient_check(batch: EvaluationBatch, of_u: Mapping[str, Any], normalization: Normalization) -> float:
    """⟨∇H, v⟩ of the backward pass against forward mode, at the baseline of the backward pass."""
    a = of_u["inner_product"][normalization]
    b = uncertainty.entropy_derivative(batch.with_baseline(of_u["baseline"]).columns, normalization).value
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def _require_numbers(rows: Sequence[Row]) -> None:
    for row in rows:
        bad = [name for name, value in row.items() if isinstance(value, float) and value != value]
        if bad:
            raise NonFiniteError(
                f"{', '.join(bad)} came out as NaN at eta = {row['eta']:g}",
                cause="fewer than two independent units: sequences of E, prompts of U, or clusters",
                way_out="take a larger batch, or variance.cluster: auto",
            )

"""What each prompt of U does to the entropy, against the whole step without it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import Probe, probe, skip_figures, whole
from proofs import Proof
from torch import Tensor

from entropy_core.checkpoints.optimizer_step import OptimizerStep
from entropy_core.numerics.adamw import clip_factor
from entropy_core.numerics.halves import HALVES, KINDS, by_normalization, entropy_and_length, of_all
from entropy_core.numerics.vectors import dot, global_norm, in_blocks
from entropy_core.policy.model import Coefficients
from entropy_core.sequences.files import read_sequences
from entropy_core.sequences.processor import processor_of
from entropy_core.store.artifact import Artifact
from entropy_core.store.columns import read_tokens

pytestmark = pytest.mark.validate

ROOT = Path(__file__).resolve().parents[2]
P, G = 64, 8
SLOPE, R_SQUARED = 0.05, 0.99


def swept(checkpoint: str, artifacts: Path) -> Probe:
    asked = {
        "name": "updates",
        "checkpoints": [str(ROOT / "artifacts/demo-run" / checkpoint)],
        "batch_config": {"E_total_sequences": 512, "B_U": P, "G": G},
        "generation": {"max_new_tokens": 32},
        "update": {"reward": "arithmetic"},
        "importance": {"etas": [0]},
        "execution": {"artifacts": str(artifacts)},
    }
    return probe(asked)


def entropy_gradients(found: Probe) -> dict[str, dict[str, Tensor]]:
    """∇H of all of E, by normalisation and parameter."""
    artifact = found.run.artifacts("entropy-gradient")[0]
    halves = artifact.summary["halves"]
    files = {(kind, half): artifact.vector(f"{kind}_{half}") for kind in KINDS for half in HALVES}
    gradients: dict[str, dict[str, Tensor]] = {"per_token": {}, "per_sequence": {}}
    for name in files["entropy", 0]:
        along = [of_all(halves, [files[kind, half][name].double() for half in HALVES]) for kind in KINDS]
        for normalization, g in by_normalization(along, *entropy_and_length(halves)).items():
            gradients[normalization][name] = g
    return gradients


def coefficients_of(update: Artifact) -> tuple[Tensor, Tensor]:
    table = read_tokens([update], "coefficient", "entropy_coefficient", file="loss.safetensors")
    return table["coefficient"], table["entropy_coefficient"]


def prompt_gradients(found: Probe) -> list[dict[str, Tensor]]:
    """Gradient of each prompt's terms of the loss, by a backward pass of its own."""
    inputs = found.run.inputs("compute-update")
    processor = processor_of(inputs["policy"], found.run.execution)
    coefficients = coefficients_of(found.run.artifacts("compute-update")[0])
    gradients, start = [], 0
    for shard in map(read_sequences, inputs["sequences"]):
        for first in range(0, len(shard), G):
            of_prompt = shard.select(torch.arange(first, first + G))
            stop = start + len(of_prompt.response_tokens_K)
            gradient = processor.policy.new_accumulator()
            for index_K, rows in processor.micro_batches(of_prompt):
                weights = Coefficients(*(values_K[start:stop][index_K] for values_K in coefficients))
                processor.policy.add_gradients(rows, [weights], inputs["policy"].temperature, [gradient])
            gradients.append(gradient)
            start = stop
    return gradients


def steps_without_one(found: Probe, max_norm: float) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """v of the whole step, and of the steps on all prompts but one: clipping, moments and all."""
    inputs = found.run.inputs("compute-update")
    processor = processor_of(inputs["policy"], found.run.execution)
    parameters = {name: p.detach().double() for name, p in processor.policy.named_parameters().items()}
    of_prompts = prompt_gradients(found)
    of_all_prompts = {name: torch.stack([g[name] for g in of_prompts]).sum(0) for name in of_prompts[0]}

    def step(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        clip = clip_factor(global_norm(gradient), max_norm)
        step = OptimizerStep(inputs["checkpoint"], found.run.execution, parameters, in_blocks(gradient), clip)
        return whole(step.part("direction"), parameters)

    # the loss on the other prompts is their mean
    rest = [{name: P / (P - 1) * (g - own[name]) for name, g in of_all_prompts.items()} for own in of_prompts]
    return step(of_all_prompts), [step(gradient) for gradient in rest]


def regression(x_P: Tensor, y_P: Tensor) -> tuple[float, float]:
    """Slope and R² of y on x."""
    x_P, y_P = x_P - x_P.mean(), y_P - y_P.mean()
    slope = float((x_P @ y_P) / (x_P @ x_P))
    return slope, slope * float(x_P @ y_P) / float(y_P @ y_P)


def test_the_influence_of_a_prompt_is_what_the_step_loses_without_it(
    record: Proof, demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    skip_figures(monkeypatch)
    record(
        "Influence of the prompts of U",
        claim=f"⟨∇H, v⟩ − ⟨∇H, v without prompt p⟩ for each of {P} prompts of U, the step without p computed anew from "
        "the gradient on (clipping, both moments), against the influence that first-order-u gives p.",
        limit=f"slope 1 ± {SLOPE:g}, R² ≥ {R_SQUARED:g}",
        columns=("checkpoint", "normalisation", "clip factor", "slope", "R²", "SE over U", "jackknife SE"),
    )
    results: list[Any] = []
    for checkpoint in ("checkpoint-6", "checkpoint-18", "checkpoint-30"):
        found = swept(checkpoint, tmp_path / "artifacts")
        summary = found.run.artifacts("compute-update")[0].summary
        v_of_all, without = steps_without_one(found, summary["max_grad_norm"])
        table = found.run.artifacts("first-order-u")[0].table("sequences.parquet")
        for normalization, dH in entropy_gradients(found).items():
            influence_N = torch.tensor(table[f"influence_{normalization}"].to_pylist(), dtype=torch.float64)
            influence_P = influence_N.view(P, G).sum(1)
            value = dot(dH, v_of_all)
            lost_P = torch.tensor([value - dot(dH, v) for v in without], dtype=torch.float64)
            # deleting p takes its term out and blows the others up by P/(P − 1)
            expected_P = P / (P - 1) * (influence_P - influence_P.mean())
            slope, r_squared = regression(expected_P, lost_P)
            linear = float((P * influence_P.var()).sqrt())
            jackknife = float(((P - 1) / P * ((lost_P - lost_P.mean()) ** 2).sum()).sqrt())
            row = (f"{slope:.4f}", f"{r_squared:.5f}", f"{linear:.4g}", f"{jackknife:.4g}")
            record.row(checkpoint, normalization, f"{summary['clip_factor']:.3f}", *row)
            results.append((slope, r_squared))
    assert all(abs(slope - 1) <= SLOPE and r_squared >= R_SQUARED for slope, r_squared in results)

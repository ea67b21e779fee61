"""What a full fine-tune takes per parameter, stage by stage; and the arithmetic of its step beside torch's AdamW."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.common import Row, median_ratio, take_turns
from benchmarks.reasons import by_profile
from benchmarks.vectors_once import SHAPES
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState, NextStep
from entropy_core.numerics.vectors import global_norm, in_blocks, squares

HOST, STORE = "≤ 16", "≤ 24"  # bytes per parameter
ROUNDS = 5


def vectors() -> Iterator[Row]:
    """Bytes per parameter of every stage, for two sizes; then the step."""
    for size in SHAPES:
        found = _probed(size)
        count = found["parameters"]
        for stage, host in found["host"].items():
            device = f"{found['device'][stage] / count:.1f} B device" if torch.cuda.is_available() else "no device"
            yield Row(
                f"bytes per parameter, {stage}, {size}",
                f"{host / count:.1f} B host, {device}",
                "4 B, the loaded model",
                host / count,
                HOST,
            ).because(lambda: "the peak of the process in this stage, above what it held when the model was loaded")
        for when, key, mark in (("during the sweep", "store", STORE), ("after it, not kept", "after", "≤ 0")):
            stored = found[key] / count
            yield Row(
                f"bytes per parameter in the store, {when}, {size}", f"{stored:.2f} B", "4 B, the model", stored, mark
            ).because(lambda: "counted are the numbers in files of the size of the policy")
    yield _step()


def _probed(size: str) -> dict[str, Any]:
    """A checkpoint of this size, made in one process and probed in another, which has held nothing before."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.vectors_once", "--size", size, "--folder", folder]
        subprocess.run([*command, "--make"], check=True, stderr=subprocess.DEVNULL)
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _step() -> Row:
    """The arithmetic of compute-update: norm, clipping, the step, its norm, and the numbers as they are stored.

    Beside it torch's optimizer, which takes the step in place. Both have the same parameters, gradients and moments in
    memory, and the same threads.
    """
    torch.manual_seed(0)
    size = "135M"
    parameters = [nn.Parameter(torch.randn(shape)) for shape in _shapes(SHAPES[size])]
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    optimizer.step()
    names = [str(i) for i in range(len(parameters))]

    def flat(tensors: list[Any]) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().reshape(-1) for name, tensor in zip(names, tensors, strict=True)}

    theta, g = in_blocks(flat(parameters)), in_blocks(flat([p.grad.double() for p in parameters]))
    m, u = (in_blocks(flat([optimizer.state[p][key] for p in parameters])) for key in ("exp_avg", "exp_avg_sq"))
    hyperparameters = AdamHyperparameters(0.9, 0.999, 1e-8, 0.01)

    def ours() -> None:
        factor = min(1.0, 1.0 / global_norm(g))

        of_direction = []
        for block in g:
            state = AdamState(1, m[block], u[block])
            v = NextStep(factor * g[block], theta[block], state, hyperparameters).direction
            of_direction.append(squares(v))
            _ = v.float(), g[block].float()

    taken = take_turns({"ours": ours, "torch's": lambda: optimizer.step()}, ROUNDS)
    here, there = (statistics.median(taken[name]) for name in ("ours", "torch's"))
    row = Row(
        f"arithmetic of the step, {size} parameters, {torch.get_num_threads()} threads",
        f"{here:.3f} s",
        f"{there:.3f} s, one step of torch.optim.AdamW",
        median_ratio(taken["ours"], taken["torch's"]),
        "≤ 4",
    )
    return row.because(lambda: by_profile(ours, lambda: optimizer.step(), "one step"))


def _shapes(of: dict[str, int]) -> list[tuple[int, ...]]:
    """Of the parameters of a Llama."""
    hidden, inner = of["hidden_size"], of["intermediate_size"]
    keys = hidden * of["num_key_value_heads"] // of["num_attention_heads"]
    layer = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    return [(of["vocab_size"], hidden), *(layer * of["num_hidden_layers"]), (hidden,)]

"""Memory and storage of a full fine-tune per parameter, stage by stage; time of the AdamW step compared with torch's.

v is the step of the optimizer per unit of learning rate.
"""

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
from benchmarks.vectors_once import RUNS, SHAPES
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState, NextStep
from entropy_core.numerics.vectors import global_norm, in_blocks, squares

HOST = "≤ 16"  # bytes per parameter
STORE = dict(zip(RUNS, (24, 29, 24, 32, 32), strict=True))
"""Bytes per parameter: two gradients on each half of E, the step, and the gradient on U; in float32, 4 each.

Shards add the weights that they hold, a tied head twice; prices the gradient of the reward on each half of E; a
post-mortem the step that was taken, in float64.
"""
ROUNDS = 5


def vectors() -> Iterator[Row]:
    """Yield rows with the bytes per parameter of every stage for two model sizes, and one row with the step's time."""
    for size in SHAPES:
        usage = _probe(size)
        count = usage["parameters"]
        for stage, host in usage["host"].items():
            device = f"{usage['device'][stage] / count:.1f} B device" if torch.cuda.is_available() else "no device"
            yield Row(
                f"bytes per parameter, {stage}, {size}",
                f"{host / count:.1f} B host, {device}",
                "4 B, the loaded model",
                host / count,
                HOST,
            ).because(lambda: "peak memory of the process in this stage, minus its memory after the model was loaded")
        held = {(f"during {run}", most): usage["store"][run] for run, most in STORE.items()}
        for (when, most), of_all in (held | {("after it, not kept", 0): usage["after"]}).items():
            stored = of_all / count
            yield Row(
                f"bytes per parameter in the store, {when}, {size}",
                f"{stored:.2f} B",
                "4 B, the model",
                stored,
                f"≤ {most}",
            ).because(lambda: "only parameter-sized files are counted")
    yield _step()


def _probe(size: str) -> dict[str, Any]:
    """Make a checkpoint of this size and probe it in a fresh process, so that making it does not count as memory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.vectors_once", "--size", size, "--folder", folder]
        subprocess.run([*command, "--make"], check=True, stderr=subprocess.DEVNULL)
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(process.stdout.strip().splitlines()[-1])


def _step() -> Row:
    """Time the arithmetic of compute-update and an in-place step of torch.optim.AdamW.

    compute-update takes the gradient norm, clips, computes the step and its norm, and casts step and gradient to
    float32 for storage. Both sides use the same parameters, gradients and moments in memory, and as many threads.
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

        squared_norms = []
        for block in g:
            state = AdamState(1, m[block], u[block])
            v = NextStep(factor * g[block], theta[block], state, hyperparameters).direction
            squared_norms.append(squares(v))
            _ = v.float(), g[block].float()

    seconds = take_turns({"ours": ours, "torch's": lambda: optimizer.step()}, ROUNDS)
    our_median, torch_median = (statistics.median(seconds[name]) for name in ("ours", "torch's"))
    row = Row(
        f"arithmetic of the step, {size} parameters, {torch.get_num_threads()} threads",
        f"{our_median:.3f} s",
        f"{torch_median:.3f} s, one step of torch.optim.AdamW",
        median_ratio(seconds["ours"], seconds["torch's"]),
        "≤ 4",
    )
    return row.because(lambda: by_profile(ours, lambda: optimizer.step(), "one step"))


def _shapes(config: dict[str, int]) -> list[tuple[int, ...]]:
    """Return the parameter shapes of a Llama model with this configuration."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    layer = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    return [(config["vocab_size"], hidden), *(layer * config["num_hidden_layers"]), (hidden,)]

"""What every pass needs in memory, against a formula; and what the formula says will fit on this device.

The formulas count what is alive at the peak, in numbers of the policy's dtype, for a micro-batch of B rows of L
positions, with D and I the widths of the model and of its feed-forward layers, H its heads, P its trained parameters,
and C the numbers in a chunk of logits, which is of 64 MiB at most.

    scoring        one layer: 4·B·L·I + 8·B·L·D; or the head: 3·C
    forward mode   2.5 times that, or 5·A; and P of the tangent. A: the scores of a block, at most B·H·L²
    gradient       every layer: 6·B·L·I + 14·B·L·D; the head: 5·C; 2·P of the sum in float64, P of g
    a step size    scoring, and P of θ + ηv

Where several devices share the layers, what is of the size of P and what all layers keep is divided among them; one
layer and the head are not.
"""

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor

from benchmarks.common import Run, status_kilobytes
from benchmarks.device.models import QWEN, SMOLLM2, Shape, make_batch, make_policy
from benchmarks.device.table import Row, Table
from benchmarks.passes import random_direction
from entropy_core.numerics.blockwise_attention import DEVICE_BYTES
from entropy_core.policy import moves
from entropy_core.policy.model import Coefficients
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.derivatives import forward_mode
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

BYTES = 4
HEAD_BYTES = 64 * 2**20
LENGTHS = tuple(2**power for power in range(8, 18))
ENOUGH = 30.0  # seconds that must be left for another pass to be measured
BETWEEN = (0.3, 1.3)  # where the measured peak may be, as a multiple of the formula

TINY = Shape("tiny", 128, 4, 4, 2, 384, 4096)


def fits(table: Table, device: torch.device, tiny: bool) -> None:
    """Measured and predicted peaks, into the group `fits`."""
    shape = TINY if tiny else (QWEN[1] if device.type == "cuda" else SMOLLM2)
    rows, length = (8, 128) if tiny else (4, 1024)
    policy = make_policy(shape, device)
    of = SequenceProcessor(policy, GenerationConfig(1.0, length, rows, rows, tf_batch_tokens=2**40))
    batch = make_batch(shape, rows, length)
    for name, run in passes(of, batch, lambda: random_direction(policy)).items():
        if table.left < (0 if tiny else ENOUGH):
            table.add("fits", {"what": name, "note": "left out: no time was left"})
            continue
        what = f"{shape.name}, {rows} × {length} positions: {name}"
        with table.attempt("fits", what):
            measured, host = peak(run, device)
            expected = needed(shape, name, rows, length)
            row = {"what": what, "device_mib": measured / 2**20, "formula_mib": expected / 2**20}
            row |= {"ratio": measured / expected, "host_mib": host / 2**20}
            table.add("fits", row | {"holds": BETWEEN[0] <= measured / expected <= BETWEEN[1]})
    memory = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else psutil.virtual_memory().total
    )
    for row in predictions(memory):
        table.add("fits", row)


def needed(shape: Shape, name: str, rows: int, length: int, devices: int = 1) -> float:
    """Bytes at the peak beside the weights, by the formula of a pass, on each device; full fine-tuning."""
    B, L, D, I = rows, length, shape.hidden, shape.intermediate  # noqa: E741 (as in the formula)
    scores, head = min(B * shape.heads * L**2, DEVICE_BYTES / BYTES), min(HEAD_BYTES / BYTES, B * L * shape.vocabulary)
    forward = max(4 * B * L * I + 8 * B * L * D, 3 * head)
    of_layers, of_policy = shape.layers * (6 * B * L * I + 14 * B * L * D) / devices, shape.parameters / devices
    numbers = {
        "scoring": forward,
        "forward mode": max(2.5 * forward, 5 * scores + 8 * B * L * D) + of_policy,
        "gradient": of_layers + 5 * head + 3 * of_policy,
        "a step size": forward + of_policy,
    }
    return BYTES * numbers[name]


def predictions(memory: float) -> Iterator[Row]:
    """The longest answer of each model, and the largest model for answers of 1,024 tokens, one row at a time."""
    for name in ("scoring", "forward mode", "gradient", "a step size"):

        def fit(shape: Shape, length: int, name: str = name) -> bool:
            return BYTES * shape.parameters + needed(shape, name, 1, length) <= 0.95 * memory

        row: dict[str, object] = {"what": f"{name}: what fits in {memory / 2**30:.0f} GiB, full fine-tuning in float32"}
        models = [shape.name for shape in (SMOLLM2, *QWEN) if fit(shape, 1024)]
        row["largest_model"] = models[-1] if models else "none"
        for shape in (SMOLLM2, QWEN[1]):
            lengths = [length for length in LENGTHS if fit(shape, length)]
            row[f"longest_answer {shape.name}"] = lengths[-1] if lengths else 0
        yield row


def passes(
    of: SequenceProcessor, batch: BatchedSequences, direction: Callable[[], dict[str, Tensor]]
) -> dict[str, Run]:
    """Each kind of pass over a batch, by name.

    Args:
        of: the policy, and the size of its micro-batches.
        batch: the sequences.
        direction: makes v, within the pass that needs it.

    Returns:
        Functions without arguments.
    """
    policy = of.policy

    def gradient() -> None:
        into = [policy.new_accumulator()]
        for index_K, rows in of.micro_batches(batch):
            ones_K = torch.ones(len(index_K), dtype=torch.float64)
            policy.add_gradients(rows, [Coefficients(ones_K, ones_K)], 1.0, into)

    def step_size() -> None:
        with moves.moved(policy, direction(), 1e-4):
            of.score(batch)

    return {
        "scoring": lambda: of.score(batch),
        "forward mode": lambda: forward_mode(of, batch, direction()),
        "gradient": gradient,
        "a step size": step_size,
    }


def peak(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return bytes at the peak beyond what was there before, on the device and on the host."""
    run()
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    host_before = status_kilobytes("VmRSS")
    with suppress(OSError):  # where that is not to be had, the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    run()
    host = 1024.0 * (status_kilobytes("VmHWM") - host_before)
    return (torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else host), host

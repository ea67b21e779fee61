"""Write `docs/sizes.md`: which model and which length of answers fit on which device, by the formulas of `device.fits`.

`python -m benchmarks.sizes docs` writes it; a test holds the page to the formulas.
"""

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.device.fits import BYTES, LENGTHS, needed
from benchmarks.device.models import QWEN, SMOLLM2, Shape

SHAPES = (SMOLLM2, *QWEN)
DEVICES = {"16 GiB": 16, "24 GiB": 24, "40 GiB": 40, "80 GiB": 80, "141 GiB": 141}
"""Memory of a device, by how a reader knows it; CPUs are counted by their RAM."""
USABLE = 0.95
ROWS, LENGTH = 8, 1024
"""Rows of a micro-batch and tokens of a sequence, prompt included, for which the first table is."""
MACHINE = (1, 2, 4, 8)
"""GPUs of one machine."""
E = 4096
HOST, STORE = 16, 24
"""Bytes of RAM and of disk per trained parameter beside the model; the marks of the benchmark of vectors."""
PASSES = {"scoring": "scoring", "forward mode": "δH₁ on E", "gradient": "gradients", "a step size": "ΔH"}
"""The kinds of passes of the formulas, and what each of them is for."""
FORWARDS = {"scoring": 1, "forward mode": 3, "gradient": 5, "a step size": 1}
"""What a pass costs, in forward passes over the same tokens."""


def sizes_page() -> str:
    """Write the page, as markdown."""
    forwards = ", ".join(f"{count} for {PASSES[name]}" for name, count in FORWARDS.items())
    parts = [
        "# Sizes",
        _text(
            "What fits on which device, and how long it takes to the order of magnitude. The numbers follow from "
            "formulas, not from measurements: `make check-device` compares both on your device. They are "
            f"with weights in float32, all of them trained, and {USABLE:.0%} of the memory for the probe. A stage that "
            "runs out of memory at the batch sizes of the configuration is run again with half the micro-batch, down "
            "to one sequence."
        ),
        "## Memory of a pass",
        _text(
            f"In GiB, the weights included, for a micro-batch of {ROWS} sequences of {LENGTH:,} tokens "
            f"and full fine-tuning. Set `generation.tf_batch_size: {ROWS}` for it: by default a micro-batch has up to "
            "256 sequences and 65,536 tokens."
        ),
        _table(
            ("model", "weights", *PASSES.values()),
            (
                (shape.name, _gib(_weights(shape)), *(_gib(_peak(shape, name, ROWS, LENGTH)) for name in PASSES))
                for shape in SHAPES
            ),
        ),
        _text(
            "*Gradients* are those of the loss on U and of the entropy on E. They keep what all layers compute, which "
            "is recomputed layer by layer where it does not fit. With LoRA the copies of the trained parameters are "
            "next to nothing. `policy.dtype: float64` doubles everything; weights in 16 bits are "
            "[refused](estimators.md#arithmetic)."
        ),
        "## Longest answers",
        "Tokens of a sequence, prompt included, with which every pass fits, one sequence at a time:",
        _table(
            ("model", *DEVICES),
            ((shape.name, *(_longest(shape, size) for size in DEVICES.values())) for shape in SHAPES),
        ),
        "## Several GPUs for one model",
        _text(
            f"GPUs that must share the layers (`execution.devices_per_policy`) for every pass to fit, one sequence of "
            f"{LENGTH:,} tokens at a time. The layers are divided by their size, and one layer is not divided:"
        ),
        _table(
            ("model", *DEVICES),
            ((shape.name, *(_devices(shape, size) for size in DEVICES.values())) for shape in SHAPES),
        ),
        "## Memory and disk of the host",
        _text(
            f"Full fine-tuning takes up to {HOST} bytes of RAM beside the model, and {STORE} bytes of disk during the "
            "sweep, per parameter, for vectors as large as the model ([measured](benchmarks.md#vectors)). With LoRA "
            "only the adapters count. The disk is freed when a checkpoint is done, unless `execution.keep_vectors` "
            "says otherwise."
        ),
        _table(
            ("model", "RAM", "disk"),
            (
                (shape.name, *(f"{_gib(count * shape.parameters)} GiB" for count in (HOST + BYTES, STORE)))
                for shape in SHAPES
            ),
        ),
        "## Time",
        _text(
            f"In forward passes over the same tokens, a checkpoint takes about {forwards} (for each step size). A "
            "forward pass over E, in PFLOP (10¹⁵ operations), to be divided by what your device does per second in "
            "float32, which is about 0.05 PFLOP on an H100 or H200:"
        ),
        _table(
            ("model", f"E of {E:,} × 256 tokens", f"E of {E:,} × {LENGTH:,} tokens"),
            (
                (shape.name, *(f"{shape.flops(E * length, length) / 1e15:.3g}" for length in (256, LENGTH)))
                for shape in SHAPES
            ),
        ),
        _text(
            "Sampling comes on top and is often the largest part, because tokens are drawn one after another. Time is "
            "proportional to the size of E; memory does not depend on it, because E is processed in shards. "
            "`entropy-probe plan my-run.yaml` says what a sweep will take once its stages have run on your device."
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _text(paragraph: str) -> str:
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def _weights(shape: Shape) -> float:
    return float(BYTES * shape.parameters)


def _peak(shape: Shape, name: str, rows: int, length: int) -> float:
    return _weights(shape) + needed(shape, name, rows, length)


def _longest(shape: Shape, gib: int) -> str:
    fitting = [
        length for length in LENGTHS if max(_peak(shape, name, 1, length) for name in PASSES) <= USABLE * gib * 2**30
    ]
    return f"{fitting[-1]:,}" if fitting else "–"


def _devices(shape: Shape, gib: int) -> str:
    def fit(devices: int) -> bool:
        peaks = (needed(shape, name, 1, LENGTH, devices) for name in PASSES)
        return _weights(shape) / devices + max(peaks) <= USABLE * gib * 2**30

    return next((str(devices) for devices in MACHINE if fit(devices)), "–")


def _gib(count: float) -> str:
    gib = count / 2**30
    return f"{gib:.0f}" if gib >= 10 else f"{gib:.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser("python -m benchmarks.sizes", description=(__doc__ or "").partition(",")[0] + ".")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs"), help="where to (default: docs)")
    (parser.parse_args().folder / "sizes.md").write_text(sizes_page(), encoding="utf-8")


if __name__ == "__main__":
    main()

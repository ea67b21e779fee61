"""Whether this project runs on this machine's device: right, fast, and in how much memory.

    python -m benchmarks.device [--tiny] [--device auto] [--out FILE] [--minutes 8]

Beside torch (2.11 or later), transformers (5.17), safetensors, pyarrow, pydantic and scipy it needs small packages:

    filelock   one writer for each key of the store
    psutil     the memory that is free for a key-value cache, on a CPU
    pyyaml     configurations

peft is used where it is installed: without it nothing is measured of adapters. Nothing is read from a network.

The JSON is written after every row, so that a run that is cut off tells what it had found. The exit status is 1 if a
number misses its tolerance, 0 otherwise. `docs/benchmarks.md` shows the JSON of `docs/device.json`.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch

from benchmarks.device import fast, fits, long, right
from benchmarks.device.table import Table
from entropy_core.policy.pretrained import resolve_device


def main(arguments: list[str] | None = None) -> int:
    """Check, and say how it went; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small models only: under a minute on two CPU cores")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is begun")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    if options.tiny and device.type == "cpu":
        torch.set_num_threads(1)  # for tensors this small, threads that wait for one another take most of the time
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    gc.collect()
    gc.freeze()  # else each of the many collections between passes goes through all that the libraries have made
    table = Table(options.out, device, 60 * options.minutes)
    print("  ".join(f"{name} {value}" for name, value in table.found["setting"].items() if value), flush=True)
    right.right(table, device)
    long.long(table, device, options.tiny)
    fast.fast(table, device, options.tiny)
    fits.fits(table, device, options.tiny)
    table.found["finished"] = True
    table.write()
    failed = table.found["failed"]
    print(f"{'failed: ' + ', '.join(failed) if failed else 'all within tolerance'}; {table.found['seconds']:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

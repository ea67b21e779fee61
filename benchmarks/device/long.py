"""Long answers: one sequence of growing length through every kind of pass, its time and its peak memory.

With blockwise attention and torch's fused kernel the memory of a pass grows no faster than the length.
"""

import statistics
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.common import seconds
from benchmarks.device.fits import passes, peak
from benchmarks.device.models import SMOLLM2, TINY, make_batch, make_policy
from benchmarks.device.table import Row, Table
from benchmarks.passes import random_direction
from entropy_core.policy.model import Policy
from entropy_core.policy.pretrained import use_full_precision
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.derivatives import forward_mode
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

SHAPE = SMOLLM2._replace(name="SmolLM2's shape, 4 layers", layers=4)
LENGTHS = {"cuda": (512, 2048, 8192, 32768), "cpu": (512, 2048, 8192)}
COMPARED = 2048  # tokens up to which the whole matrix of scores is computed, too
MORE = 1.1  # growth of the peak over that of the length, from one length to the next
TOLERANCES = {"ℓ": 1e-5, "h": 1e-5, "ℓ̇": 1e-5, "ḣ": 1e-4}  # ḣ of a random policy is what is left of larger terms
ROUNDS = 3
ENOUGH = 20.0  # seconds that must be left for another length


def long(table: Table, device: torch.device, tiny: bool) -> None:
    """A row for each pass and length, into the group `long`."""
    use_full_precision()
    shape, lengths = (TINY, (64, 128, 256)) if tiny else (SHAPE, LENGTHS[device.type])
    policy = make_policy(shape, device)
    direction = random_direction(policy)
    found: dict[str, list[tuple[int, float]]] = {}  # by pass: lengths, and bytes at the peak
    for length in lengths:
        if table.left < (0 if tiny else ENOUGH):
            table.add("long", {"what": f"{length:,} tokens", "note": "left out: no time was left"})
            continue
        of, batch = SequenceProcessor(policy, GenerationConfig(1.0, length, 1, 1)), make_batch(shape, 1, length)
        took = 0.0
        runs = {"bare forward of the trunk": partial(_trunk, policy, of, batch)}
        for name, run in (runs | passes(of, batch, lambda: direction)).items():
            what = f"{shape.name}, {length:,} tokens: {name}"
            with table.attempt("long", what):
                most, _ = peak(run, device)
                of_run = statistics.median(seconds(run) for _ in range(ROUNDS))
                took = took or of_run
                row: dict[str, object] = {"what": what, "seconds": of_run, "bare_forwards": of_run / took}
                found.setdefault(name, []).append((length, most))
                table.add("long", row | {"peak_mib": most / 2**20} | _growth(found[name], hold=not tiny))
        if length <= COMPARED:
            with table.attempt("long", f"{shape.name}, {length:,} tokens: against the whole matrix of scores"):
                for row in _errors(of, batch, direction, f"{shape.name}, {length:,} tokens"):
                    table.add("long", row)


def _trunk(policy: Policy, of: SequenceProcessor, batch: BatchedSequences) -> None:
    """Without the head: the logits of a long answer would take more than all passes here."""
    with torch.no_grad():
        for _, rows in of.micro_batches(batch):
            policy.scorer.hidden(rows)


def _growth(found: list[tuple[int, float]], hold: bool) -> Row:
    """Bytes of a further token, and whether the peak grew no faster than the length; nothing at the first length."""
    if len(found) < 2:
        return {}
    (short, before), (length, now) = found[-2:]
    row: Row = {"kib_per_token": (now - before) / (length - short) / 1024}
    return row | {"holds": now / before <= MORE * length / short} if hold else row


def _errors(of: SequenceProcessor, batch: BatchedSequences, v: dict[str, torch.Tensor], what: str) -> Iterator[Row]:
    """ℓ, h, ℓ̇ and ḣ against attention with all scores at once, relative to their root mean square."""
    blockwise = forward_mode(of, batch, v)
    own, of.policy.forward_mode_attention = of.policy.forward_mode_attention, "eager"
    try:
        whole = forward_mode(of, batch, v)
    finally:
        of.policy.forward_mode_attention = own
    for name, ours, theirs in zip(("ℓ", "h", "ℓ̇", "ḣ"), blockwise, whole, strict=True):
        error = float((ours - theirs).double().norm() / theirs.double().norm())
        held = {"tolerance": TOLERANCES[name], "holds": error <= TOLERANCES[name]}
        yield {"what": f"{what}: {name} in blocks", "error": error} | held

"""How fast every pass is, beside the bare forward pass and `model.generate`, and how much of the arithmetic it uses."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Run, seconds
from benchmarks.device.models import QWEN, SMOLLM2, TINY, Shape, Training, make_batch, make_policy, trainings
from benchmarks.device.table import Row, Table
from benchmarks.passes import bare_forward, random_direction
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState, NextStep
from entropy_core.policy import moves
from entropy_core.policy.attention import attention_set
from entropy_core.policy.model import Coefficients, Policy
from entropy_core.policy.pretrained import use_full_precision
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.derivatives import forward_mode
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

ROUNDS = 3
ENOUGH = 60.0  # seconds that must be left for another model to be begun
LINES = 10  # of a profile
MOST_NUMBERS = 2**26  # of parameters whose step is timed


class Sizes(NamedTuple):
    """What is measured on."""

    shapes: tuple[Shape, ...]
    sequences: int
    length: int
    micro_batch: int
    sampled: tuple[int, ...]  # batches
    new_tokens: int


FULL = Sizes((SMOLLM2, QWEN[1]), 32, 256, 16, (64, 256), 64)
SMALL = Sizes((TINY,), 8, 32, 4, (4, 8), 8)


class Way(NamedTuple):
    """A pass over all sequences, and the products that it takes, as a multiple of a forward pass."""

    name: str
    run: Run
    forwards: float


def fast(table: Table, device: torch.device, tiny: bool) -> None:
    """Seconds of every pass, into the group `fast`; where they go, into `profile`."""
    use_full_precision()
    sizes = SMALL if tiny else FULL
    peak = _peak(device)
    table.add("fast", {"what": "float32 matrix products, the rate that shares are of", "tflops": peak / 1e12})
    for shape in sizes.shapes:
        for training in trainings():
            if not tiny and table.left < ENOUGH:
                table.add("fast", {"what": f"{shape.name}, {training}", "note": "left out: no time was left"})
                continue
            name = f"{shape.name}, {training}"
            with table.attempt("fast", name):
                of = _processor(shape, device, training, sizes)
                for row in _passes(of, shape, training, sizes, peak):
                    table.add("fast", row)
            if training == "full":
                with table.attempt("fast", f"{name}: sampling"):
                    for row in _sampling(of, shape, sizes, peak):
                        table.add("fast", row)
                if shape is sizes.shapes[-1]:
                    with table.attempt("fast", f"{name}: profiles"):
                        for row in _profiles(of, shape, sizes):
                            table.add("profile", row)
            of = None
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _processor(shape: Shape, device: torch.device, training: Training, sizes: Sizes) -> SequenceProcessor:
    policy = make_policy(shape, device, training)
    return SequenceProcessor(policy, GenerationConfig(1.0, sizes.new_tokens, max(sizes.sampled), sizes.micro_batch))


def _peak(device: torch.device) -> float:
    """Floating-point operations a second of a large product of float32 matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    a @ b
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(ROUNDS))


def _passes(of: SequenceProcessor, shape: Shape, training: Training, sizes: Sizes, peak: float) -> Iterator[Row]:
    batch = make_batch(shape, sizes.sequences, sizes.length)
    tokens = sizes.sequences * sizes.length
    work = shape.flops(tokens, sizes.length)
    found = list(_ways(of, batch, training))
    taken: dict[str, list[float]] = {way.name: [] for way in found}
    for way in found:
        way.run()
    for _ in range(ROUNDS):
        for way in found:
            taken[way.name].append(seconds(way.run))
    bare = taken[found[0].name]
    for way in found:
        took = statistics.median(taken[way.name])
        row: dict[str, Any] = {
            "what": f"{shape.name}, {training}: {way.name}",
            "seconds": took,
            "tokens_per_s": tokens / took,
        }
        row["bare_forwards"] = statistics.median(a / b for a, b in zip(taken[way.name], bare, strict=True))
        row["share_of_peak"] = way.forwards * work / took / peak
        yield row
    yield _arithmetic(of.policy, f"{shape.name}, {training}")


def _ways(of: SequenceProcessor, batch: BatchedSequences, training: Training) -> Iterator[Way]:
    policy = of.policy
    v = random_direction(policy)

    def eager() -> None:
        with attention_set(policy.model, "eager"):
            bare_forward(of, batch)

    def gradient(kinds: int) -> None:
        into = [policy.new_accumulator() for _ in range(kinds)]
        for index_K, rows in of.micro_batches(batch):
            ones_K = torch.ones(len(index_K), dtype=torch.float64)
            policy.add_gradients(rows, [Coefficients(ones_K, ones_K)] * kinds, 1.0, into)

    def moved() -> None:
        with moves.moved(policy, v, 1e-4):
            of.score(batch)

    adapters = training == "LoRA"  # whose frozen matrices have no tangent and no gradient
    yield Way("bare forward, fused attention", lambda: bare_forward(of, batch), 1)
    yield Way("bare forward, eager attention", eager, 1)
    yield Way("scoring", lambda: of.score(batch), 1)
    yield Way("forward mode", lambda: forward_mode(of, batch, v), 2 if adapters else 3)
    yield Way("gradient of the loss", lambda: gradient(1), 2 if adapters else 3)
    yield Way("gradients of entropy and length", lambda: gradient(2), 3 if adapters else 5)
    yield Way("a step size", moved, 1)


def _arithmetic(policy: Policy, name: str) -> Row:
    """The optimizer's step of some parameters, on the CPU as compute-update has it."""
    settings = AdamHyperparameters(0.9, 0.999, 1e-8, 0.1)
    chosen, numbers = [], 0
    for parameter in policy.named_parameters().values():
        if numbers + parameter.numel() <= MOST_NUMBERS:
            chosen.append(parameter.detach().cpu())
            numbers += parameter.numel()

    def run() -> None:
        for parameter in chosen:
            theta = parameter.double()
            ones = torch.ones_like(theta)
            _ = NextStep(ones, theta, AdamState(3, ones, ones), settings).direction

    return {"what": f"{name}: the optimizer's arithmetic", "numbers_per_s": numbers / seconds(run)}


def _sampling(of: SequenceProcessor, shape: Shape, sizes: Sizes, peak: float) -> Iterator[Row]:
    """Tokens a second of the decoder and of `model.generate`, in batches whose responses are equally long."""
    for batch in sizes.sampled:
        generator = torch.Generator().manual_seed(2)
        prompts_BL = torch.randint(3, shape.vocabulary, (batch, 32), generator=generator)
        prompts, tokens = prompts_BL.tolist(), batch * sizes.new_tokens
        ours = _rate(partial(of.generate_distinct, prompts, batch, 1, 3, "E"), tokens)
        theirs = _rate(partial(_generate, of.policy, prompts_BL, sizes.new_tokens), tokens)
        yield {
            "what": f"{shape.name}: sampling, batch {batch}",
            "tokens_per_s": ours,
            "of_generate": ours / theirs,
            "share_of_peak": ours * 2 * shape.parameters / peak,
        }


def _rate(run: Run, tokens: int) -> float:
    run()
    return tokens / seconds(run)


def _generate(policy: Policy, prompts_BL: Tensor, new_tokens: int) -> None:
    ids_BL = prompts_BL.to(policy.device)
    with torch.no_grad():
        policy.model.generate(
            ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )


def _profiles(of: SequenceProcessor, shape: Shape, sizes: Sizes) -> Iterator[Row]:
    """Where the time of three passes goes: ten lines for each."""
    policy, batch = of.policy, make_batch(shape, sizes.sequences, sizes.length).select(torch.arange(sizes.micro_batch))
    prompts = torch.ones(min(sizes.sampled), 32, dtype=torch.long).tolist()
    v = random_direction(policy)
    runs: dict[str, Callable[[], Any]] = {
        "scoring": lambda: of.score(batch),
        "forward mode": lambda: forward_mode(of, batch, v),
        "sampling": lambda: of.generate_distinct(prompts, len(prompts), 1, 3, "E"),
    }
    for name, run in runs.items():
        yield {"what": f"{shape.name}: {name}", "lines": _profile(run, policy.device.type == "cuda")}


def _profile(run: Run, on_gpu: bool) -> list[str]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as found:
        took = seconds(run)
    averages = found.key_averages()
    operations = [event for event in averages if event.device_type == DeviceType.CPU]
    kernels = [event for event in averages if event.device_type != DeviceType.CPU]
    host = sum(event.self_cpu_time_total for event in operations) / 1e6
    reads = sum(event.count for event in operations if event.key == "aten::_local_scalar_dense")
    shown, time_of = (kernels, "self_device_time_total") if on_gpu else (operations, "self_cpu_time_total")
    there = sum(getattr(event, time_of) for event in shown) / 1e6
    copies = sum(getattr(event, time_of) for event in shown if event.key.startswith(("Memcpy", "aten::copy_"))) / 1e6
    most = sorted(shown, key=lambda event: -getattr(event, time_of))[: LINES - 2]
    return [
        f"wall {took:.3f} s; host {host:.3f} s; kernels {there:.3f} s, {sum(event.count for event in shown)} of them",
        f"copies {copies:.4f} s; numbers that the host waited for: {reads}",
        *(f"{getattr(event, time_of) / 1e6:.4f} s  {event.count:6}  {event.key[:80]}" for event in most),
    ]

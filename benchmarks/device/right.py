"""Whether the device computes what the CPU does: on a tiny policy, number by number, and through one whole sweep."""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device.models import TINY, make_policy
from benchmarks.device.sweep import differences, pool_differences
from benchmarks.device.table import Row, Table
from benchmarks.passes import random_direction
from entropy_core.numerics import philox
from entropy_core.numerics.adamw import AdamHyperparameters, AdamState, NextStep
from entropy_core.numerics.choices import Arithmetic
from entropy_core.numerics.philox import Purpose
from entropy_core.policy import moves
from entropy_core.policy.model import Coefficients, Policy
from entropy_core.policy.pretrained import use_full_precision
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.derivatives import central_difference, forward_mode
from entropy_core.sequences.processor import GenerationConfig, SequenceProcessor

SPREAD = 0.15  # of the weights: entropies of between one and five nats
SEQUENCES, TOKENS, TAU, ETA = 96, 24, 0.9, 1e-3
CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]

# Root mean square of the error over that of the quantity. None: told, and held to nothing.
TOLERANCES: dict[str, dict[str, float | None]] = {
    "float32": {"ℓ": 2e-6, "h": 2e-6, "ℓ̇": 2e-5, "ḣ": 2e-5, "∇H": 2e-5, "ℓ(θ+ηv) − ℓ(θ)": 1e-2},
    "TF32": {"ℓ": 5e-3, "h": 5e-3, "ℓ̇": 2e-2, "ḣ": 2e-2, "∇H": 2e-2, "ℓ(θ+ηv) − ℓ(θ)": None},
    "bfloat16": dict.fromkeys(("ℓ", "h", "ℓ̇", "ḣ", "∇H", "ℓ(θ+ηv) − ℓ(θ)")),
}


def right(table: Table, device: torch.device) -> None:
    """Every check of whether the numbers are right, into the group `right`."""
    use_full_precision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels; those of reproducibility are counted below
        for check in CHECKS:
            with table.attempt("right", check.__name__.strip("_").replace("_", " ")):
                for row in check(device):
                    table.add("right", row)


def _draws(device: torch.device) -> Iterator[Row]:
    yield _held("draws", "integer", _different_draws(device), 0.0)


def _quantity_by_quantity(device: torch.device) -> Iterator[Row]:
    sequences = _usual_sequences()
    exact = _quantities(_processor(CPU, torch.float64), sequences)
    for arithmetic, tolerances in TOLERANCES.items():
        if arithmetic == "TF32" and device.type != "cuda":
            yield {"what": arithmetic, "note": "this device has none"}
            continue
        with _computing_in(arithmetic):
            of = _processor(device, torch.bfloat16 if arithmetic == "bfloat16" else torch.float32)
            if arithmetic != "bfloat16":
                limit = 0.01 if arithmetic == "float32" else None
                yield _held("tokens that differ from the CPU's", arithmetic, _mismatch(_sampled(of), sequences), limit)
            found = _quantities(of, sequences)
            for name, tolerance in tolerances.items():
                yield _held(name, arithmetic, _relative(found[name], exact[name]), tolerance)


def _forward_mode_in_another_arithmetic(device: torch.device) -> Iterator[Row]:
    """As `policy.arithmetic` has it: float32 weights, and only the products of the trunk are less exact."""
    sequences, of = _usual_sequences(), _processor(device)
    exact = _quantities(_processor(CPU, torch.float64), sequences)
    arithmetics: dict[Arithmetic, float] = {"bf16": 5e-2} | ({"tf32": 1e-2} if device.type == "cuda" else {})
    for arithmetic, tolerance in arithmetics.items():
        found = forward_mode(of, sequences, _direction(of.policy), arithmetic)
        for name, values_K in zip(("ℓ̇", "ḣ"), found[2:], strict=True):
            error = _relative(values_K.double().cpu(), exact[name])
            yield _held(f"{name}, float32 weights", arithmetic, error, tolerance)


def _optimizer(device: torch.device) -> Iterator[Row]:
    yield _held("AdamW against torch's own", "float64", _against_torchs_adamw(device), 1e-12)


def _noise_of_rounding(device: torch.device) -> Iterator[Row]:
    sequences = _usual_sequences()
    ratio = _noise(_processor(device), sequences) / _noise(_processor(CPU), sequences)
    row = {"what": "noise of ℓ from rounding, over the CPU's", "arithmetic": "float32", "error": ratio}
    yield row | {"tolerance": 4.0, "holds": 0.25 <= ratio <= 4}


def _whole_sweep(device: torch.device) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for most in differences(Path(folder), device.type):
            yield _held(f"sweep: {most.stage}, most in {most.column}", "float32", most.error, most.tolerance)


def _layers_on_two_devices(device: torch.device) -> Iterator[Row]:
    """As `execution.devices_per_policy` has it."""
    if _devices(device) < 2:
        yield {"what": "layers on two devices", "note": "there is one device"}
        return
    with tempfile.TemporaryDirectory() as folder:
        for most in differences(Path(folder), device.type, 2):
            yield _held(f"two devices: {most.stage}, most in {most.column}", "float32", most.error, most.tolerance)


def _a_pool_over_all_devices(device: torch.device) -> Iterator[Row]:
    """Every stage with the policy, at the same time in as many workers as there are devices."""
    if not (count := _devices(device)):
        yield {"what": "a pool of workers", "note": "there is no GPU"}
        return
    with tempfile.TemporaryDirectory() as folder:
        for most in pool_differences(Path(folder), device.type):
            what = f"pool of {count}: {most.stage}, most in {most.column}"
            yield _held(what, "float32", most.error, most.tolerance)


def _devices(device: torch.device) -> int:
    return torch.cuda.device_count() if device.type == "cuda" else 0


def _held(what: str, arithmetic: str, error: float, tolerance: float | None) -> Row:
    holds = None if tolerance is None else error <= tolerance
    return {"what": what, "arithmetic": arithmetic, "error": error, "tolerance": tolerance, "holds": holds}


def _processor(device: torch.device, dtype: torch.dtype = torch.float32) -> SequenceProcessor:
    policy = make_policy(TINY, CPU, spread=SPREAD)  # the same weights in every dtype
    policy = Policy(policy.model.to(device, dtype), policy.tokenizer)
    return SequenceProcessor(policy, GenerationConfig(TAU, TOKENS, 32, 32))


@cache
def _usual_sequences() -> BatchedSequences:
    """What the CPU samples."""
    return _sampled(_processor(CPU))


def _sampled(of: SequenceProcessor) -> BatchedSequences:
    return of.generate_with_replacement_sampling(PROMPTS, SEQUENCES, seed=3)


def _different_draws(device: torch.device) -> float:
    ids_N1, position_T = torch.arange(64).unsqueeze(1), torch.arange(64)
    usual = philox.uniforms(5, Purpose.E_TOKEN, ids_N1, position_T)
    there = philox.uniforms(5, Purpose.E_TOKEN, ids_N1.to(device), position_T.to(device))
    return float((there.cpu() != usual).double().mean())


def _mismatch(found: BatchedSequences, expected: BatchedSequences) -> float:
    """Share of tokens from the first on that differs in its sequence."""
    equal = total = 0
    for i in range(len(expected)):
        ours, theirs = found.response(i).tolist(), expected.response(i).tolist()
        pairs = list(zip(ours, theirs, strict=False))
        agreed = next((k for k, (a, b) in enumerate(pairs) if a != b), len(pairs))
        equal, total = equal + agreed, total + len(theirs)
    return 1 - equal / total


def _quantities(of: SequenceProcessor, sequences: BatchedSequences) -> dict[str, Tensor]:
    """What a sweep computes with a policy, each as one float64 tensor on the CPU."""
    v = _direction(of.policy)
    logprobs_K, entropies_K, dlogprobs_K, dentropies_K = forward_mode(of, sequences, v)
    gradient = _gradient(of, sequences)
    with moves.moved(of.policy, v, ETA):
        moved_K = of.score(sequences)[0].logprobs_K
    at_theta_K = of.score(sequences)[0].logprobs_K
    found = {
        "ℓ": logprobs_K,
        "h": entropies_K,
        "ℓ̇": dlogprobs_K,
        "ḣ": dentropies_K,
        "∇H": torch.cat([gradient[name].flatten() for name in sorted(gradient)]),
        "ℓ(θ+ηv) − ℓ(θ)": moved_K.double() - at_theta_K.double(),
    }
    return {name: values.double().cpu() for name, values in found.items()}


def _direction(policy: Policy) -> dict[str, Tensor]:
    """The same direction in every dtype, on the policy's device."""
    plain = make_policy(TINY, CPU, spread=SPREAD)
    parameters = policy.named_parameters()
    return {name: t.to(parameters[name]) for name, t in random_direction(plain).items()}


def _gradient(of: SequenceProcessor, sequences: BatchedSequences) -> dict[str, Tensor]:
    """∇Σ_k (h_k + c_k ℓ_k) with coefficients that differ from token to token."""
    into = [of.policy.new_accumulator()]
    for index_K, rows in of.micro_batches(sequences):
        weights = Coefficients(torch.cos(index_K.double()), torch.ones(len(index_K), dtype=torch.float64))
        of.policy.add_gradients(rows, [weights], TAU, into)
    return into[0]


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def derivatives_agree(device: torch.device) -> Iterator[Row]:
    """Forward mode against the backward pass and against central differences, on the device."""
    of, sequences = _processor(device), _usual_sequences()
    v, gradient = _direction(of.policy), _gradient(of, sequences)
    backward = sum(float((g.double() * v[name].double()).sum()) for name, g in gradient.items())
    derivatives = forward_mode(of, sequences, v)
    weights_K = torch.cos(torch.arange(len(derivatives.logprobs_K)).double())
    forward = float((derivatives.dentropies_K.double() + weights_K * derivatives.dlogprobs_K.double()).sum())
    yield _held("forward mode against backward", "float32", abs(forward - backward) / abs(backward), 1e-4)
    error = min(
        _relative(central_difference(of, sequences, v, width)[0].cpu(), derivatives.dlogprobs_K.double().cpu())
        for width in (3e-3, 1e-3, 3e-4)
    )
    yield _held("forward mode against central differences", "float32", error, 1e-2)


def _against_torchs_adamw(device: torch.device) -> float:
    """lr·v of some tensors against what torch's optimizer adds to them there, float64."""
    torch.manual_seed(1)
    shapes, lr = [(7, 5), (64,), (3, 2, 4)], 1e-3
    theta = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    parameters = [t.to(device).requires_grad_() for t in theta]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)
    for _ in range(3):
        before = [p.detach().cpu().clone() for p in parameters]
        states = [optimizer.state.get(p) for p in parameters]
        saved = [
            AdamState(int(of["step"]), of["exp_avg"].cpu().clone(), of["exp_avg_sq"].cpu().clone())
            if of
            else AdamState(0, torch.zeros_like(t), torch.zeros_like(t))
            for of, t in zip(states, theta, strict=True)
        ]
        gradients = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.to(device)
        optimizer.step()
    settings = AdamHyperparameters(0.9, 0.999, 1e-8, 0.1)
    errors = [
        _relative(lr * NextStep(g, t, state, settings).direction, p.detach().cpu() - t)
        for g, t, state, p in zip(gradients, before, saved, parameters, strict=True)
    ]
    return max(errors)


def _noise(of: SequenceProcessor, sequences: BatchedSequences) -> float:
    """Root mean square of what moving every parameter to a neighbouring number does to ℓ."""
    usual_K = of.score(sequences)[0].logprobs_K.double()
    with moves.jittered(of.policy, seed=0):
        return float((of.score(sequences)[0].logprobs_K.double() - usual_K).square().mean().sqrt())


def _the_same_bits_again(device: torch.device) -> Iterator[Row]:
    """Whether a pass gives the same bits a second time, and which kernels torch says need not."""
    of, sequences = _processor(device), _usual_sequences()
    v = _direction(of.policy)
    passes: Mapping[str, Callable[[], Any]] = {
        "sampling": lambda: _sampled(of).response_tokens_K,
        "scoring": lambda: of.score(sequences)[0].logprobs_K,
        "forward mode": lambda: torch.cat(list(forward_mode(of, sequences, v))),
        "gradient": lambda: torch.cat([g.flatten().cpu() for g in _gradient(of, sequences).values()]),
    }
    for name, run in passes.items():
        with _reproducibility_noted() as said:
            equal = torch.equal(run(), run())
        yield {"what": f"{name}: the same bits again", "equal": equal, "note": "; ".join(sorted(said))}


@contextmanager
def _reproducibility_noted() -> Iterator[set[str]]:
    """Within the context torch warns of kernels that need not give the same bits again."""
    said: set[str] = set()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said |= {str(w.message).partition(" ")[0] for w in caught if "deterministic" in str(w.message)}
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _computing_in(arithmetic: str) -> Iterator[None]:
    """Within the context products of float32 numbers are made in TF32, if that is what is asked for."""
    torch.set_float32_matmul_precision("high" if arithmetic == "TF32" else "highest")
    try:
        yield
    finally:
        use_full_precision()


CHECKS = (
    _draws,
    _quantity_by_quantity,
    _forward_mode_in_another_arithmetic,
    derivatives_agree,
    _optimizer,
    _noise_of_rounding,
    _the_same_bits_again,
    _whole_sweep,
    _layers_on_two_devices,
    _a_pool_over_all_devices,
)

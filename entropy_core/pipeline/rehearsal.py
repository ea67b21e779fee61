"""Try every kind of pass on one short row before the first real one, so that no architecture is refused after hours."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from entropy_core.errors import CheckpointError, ProbeError, one_line, shortage
from entropy_core.execution import Execution
from entropy_core.policy.model import Coefficients
from entropy_core.policy.spec import PolicySpec
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.derivatives import forward_mode
from entropy_core.sequences.processor import SequenceProcessor, processor_of

TOKENS = 3
"""Of the prompt; the response has two at most, of which the second needs the cache."""

_Found = TypeVar("_Found")
_rehearsed: set[PolicySpec] = set()


def is_rehearsed(spec: PolicySpec) -> bool:
    """Return whether all passes were tried with this policy, in this process."""
    return spec in _rehearsed


def rehearse(spec: PolicySpec, execution: Execution) -> None:
    """Sample, score and differentiate one short row with a policy, in both modes.

    It costs a few forward passes of a row of five tokens, and loads the policy, which the next stage then has.

    Args:
        spec: the policy.
        execution: device and paths of files.

    Raises:
        CheckpointError: a pass fails; names the architecture and the pass.
    """
    processor = processor_of(spec, replace(execution, progress=Execution.progress), max_new_tokens=2)
    name = type(processor.policy.model).__name__
    vocabulary = processor.policy.model.get_input_embeddings().weight.shape[0]
    row = _attempt(f"{name} cannot be sampled", lambda: _sampled(processor, [*range(min(TOKENS, vocabulary))]))
    _attempt(f"{name} cannot be scored", lambda: processor.score(row))
    _attempt(f"{name} has no forward-mode derivative", lambda: forward_mode(processor, row, _direction(processor)))
    _attempt(f"{name} has no gradient", lambda: _backward(processor, row))
    _rehearsed.add(spec)


def _attempt(fact: str, attempt: Callable[[], _Found]) -> _Found:
    try:
        return attempt()
    except (ProbeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # models of all kinds raise errors of all kinds
        raise shortage(error) or CheckpointError(
            f"{fact}: {type(error).__name__}: {one_line(error)}",
            cause="an architecture whose cache or whose operations are of a kind that is not supported here",
            fix="probe another architecture; nothing was sampled yet",
        ) from error


def _sampled(processor: SequenceProcessor, prompt: list[int]) -> BatchedSequences:
    return processor.generate_distinct([prompt], 1, 1, seed=0, purpose="U")


def _some_parameters(processor: SequenceProcessor) -> dict[str, Tensor]:
    """One trained parameter of each kind, the first of its layers, so that every later layer is differentiated."""
    kinds: dict[str, str] = {}
    parameters = processor.policy.named_parameters()
    for name in parameters:
        kinds.setdefault(re.sub(r"\d+", "", name), name)
    return {name: parameters[name] for name in kinds.values()}


def _direction(processor: SequenceProcessor) -> dict[str, Tensor]:
    return {name: torch.ones_like(parameter) for name, parameter in _some_parameters(processor).items()}


def _backward(processor: SequenceProcessor, row: BatchedSequences) -> None:
    gradient = processor.policy.new_accumulator(_some_parameters(processor))
    for _, rows in processor.micro_batches(row):
        weights_K = torch.ones(len(rows.tokens_K), dtype=torch.float64)
        both = Coefficients(weights_K, weights_K)
        processor.policy.add_gradients(rows, [both], processor.config.temperature, [gradient])

"""The exact next steps of the optimizer under several losses and hyperparameters, which share what they can."""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_core.checkpoints.optimizer_step import moved_parameters
from entropy_core.losses.taken_step import TakenStep, step_along
from entropy_core.numerics.altered_optimizer import Altered
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.spanning import combined, spanning
from entropy_core.numerics.vectors import gradients_at_once
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.loss_gradient import add_loss_gradients
from entropy_core.sequences.processor import SequenceProcessor

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Artifact


def taken_steps(
    under: Sequence[tuple[TokenPair, Altered]],
    processor: SequenceProcessor,
    shards: Sequence[BatchedSequences],
    checkpoint: "Artifact",
    execution: "Execution",
    max_grad_norm: float,
    run: TokenPair,
) -> Iterator[list[TakenStep]]:
    """Take the step under several losses and hyperparameters; the other arguments are those of `taken_step`.

    There is a backward pass for as many losses as have linearly independent coefficients, see `numerics.spanning`. They
    share forward passes, see `add_loss_gradients`.

    Args:
        under: coefficients and hyperparameters of each step.
        processor: the policy.
        shards: the sequences of U.
        checkpoint: artifact of load-checkpoint.
        execution: knows where `optimizer.pt` is.
        max_grad_norm: global norm at which the gradients are clipped.
        run: coefficients of the run as it is. Their gradient is never combined from others, so that what an
            intervention leaves as it is differs from it by 0, whatever is tried beside it.

    Yields:
        The steps in their order, as many at a time as there is room for gradients.
    """
    model, moving = processor.policy, moved_parameters(checkpoint)
    numbers = sum(parameter.numel() for name, parameter in model.named_parameters().items() if name in moving)
    at_once, state = gradients_at_once(numbers), None
    for start in range(0, len(under), at_once):
        of_these = under[start : start + at_once]
        gradients = _gradients([pair for pair, _ in of_these], processor, shards, moving, run)
        steps: list[TakenStep] = []
        for g, (_, altered) in zip(gradients, of_these, strict=True):
            steps.append(step_along(g, model, checkpoint, execution, max_grad_norm, altered, state=state))
            state = steps[-1].step.on({}, 1.0)  # the state, without a gradient
        found = [steps]
        del gradients, steps, g
        yield found.pop()  # no name for them: when the caller lets go of them, their gradients are gone


def _gradients(
    pairs: Sequence[TokenPair],
    processor: SequenceProcessor,
    shards: Sequence[BatchedSequences],
    moving: Collection[str],
    run: TokenPair,
) -> list[dict[str, Tensor]]:
    """The gradient of each loss, computed or combined from others; that of equal coefficients is one object."""
    model, distinct = processor.policy, list[TokenPair]()
    places = [_place(pair, distinct) for pair in pairs]
    of_run = [_same(pair, run) for pair in distinct]
    tokens = [int(((pair[0] != 0) | (pair[1] != 0)).sum()) for pair in distinct]
    costs = [
        0 if of_this else count for of_this, count in zip(of_run, tokens, strict=True)
    ]  # the run's is chosen first
    chosen, multiples_IB = spanning([torch.cat(pair) for pair in distinct], costs)
    besides = [place for place, of_this in enumerate(of_run) if of_this and place not in chosen]
    gradients = [model.new_accumulator(moving) for _ in [*chosen, *besides]]
    add_loss_gradients(gradients, processor, shards, [distinct[place] for place in [*chosen, *besides]])
    known, computed = dict(zip([*chosen, *besides], gradients, strict=True)), gradients[: len(chosen)]
    for place, multiples_B in enumerate(multiples_IB):
        if place not in known:
            none = model.new_accumulator(moving)
            known[place] = {
                n: combined(multiples_B, [of[n] for of in computed], g, model.dtype) for n, g in none.items()
            }
    return [known[place] for place in places]


def _place(pair: TokenPair, known: list[TokenPair]) -> int:
    """Where a pair is in a list, to which it is added if it is in none."""
    for place, other in enumerate(known):
        if _same(pair, other):
            return place
    known.append(pair)
    return len(known) - 1


def _same(pair: TokenPair, other: TokenPair) -> bool:
    """Whether two losses have the same coefficients, bit for bit."""
    return all(torch.equal(*columns) for columns in zip(pair, other, strict=True))

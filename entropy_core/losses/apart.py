"""A loss of the user, called and differentiated in a process of its own, see `isolation`.

That process is sent the batch and sends back what the sweep needs of a loss: `token_coefficients`, `influences`, and
whether it is one, `check_loss`. A loss of this package is differentiated where it is asked for.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from entropy_core.errors import LossError, one_line
from entropy_core.isolation.process import Isolation
from entropy_core.losses import functions
from entropy_core.losses.functions import SIGNATURE, load_loss, source_file
from entropy_core.numerics import losses
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.loss_batch import LossBatch
from entropy_core.numerics.losses import LOSSES

log = logging.getLogger("entropy_probe.losses")

_DEFAULT_LIMITS = Isolation()


def token_coefficients(name: str, batch: LossBatch, isolation: Isolation = _DEFAULT_LIMITS) -> TokenPair:
    """`losses.coefficients`, all of them finite.

    Args:
        name: of the loss.
        batch: U.
        isolation: how a function of the user is called.

    Returns:
        ∂L/∂ℓ_k and ∂L/∂h_k.

    Raises:
        LossError: the loss fails, there is no gradient, or a number in it is not finite; names the response. Or it
            passed a limit, or ended its process.
        ConfigError: there is no such function.
    """
    if name in LOSSES:
        return functions.coefficients_of(name, LOSSES[name], batch)
    [found] = _pairs_apart(isolation, name, _coefficients_apart, [batch])
    return functions.require_finite(name, found, batch)


def coefficients_of_each(
    name: str, batches: Sequence[LossBatch], isolation: Isolation = _DEFAULT_LIMITS
) -> list[TokenPair | None]:
    """`losses.coefficients` of several batches, on some of which the loss may have no finite gradient.

    Args:
        name: of the loss.
        batches: parts of U.
        isolation: how a function of the user is called: in one process, with the seconds for each batch anew.

    Returns:
        ∂L/∂ℓ_k and ∂L/∂h_k of each batch; None where the loss fails, or a number is not finite.

    Raises:
        LossError: a function of the user passed a limit, or ended its process.
        ConfigError: there is no such function.
    """
    if name in LOSSES:
        pairs = [losses.coefficients(LOSSES[name], batch) for batch in batches]
    else:
        pairs = _pairs_apart(isolation, name, _coefficients_of_each_apart, batches) if batches else []
    found = [pair if all(torch.isfinite(values_K).all() for values_K in pair) else None for pair in pairs]
    if None in found:
        log.warning("loss %r has no finite gradient on %d of %d parts of U", name, found.count(None), len(found))
    return found


def influences(
    name: str, batch: LossBatch, pairs: Sequence[TokenPair], isolation: Isolation = _DEFAULT_LIMITS
) -> list[Tensor]:
    """`losses.influence` along several directions.

    Args:
        name: of the loss.
        batch: U.
        pairs: a_k and b_k of each direction.
        isolation: how a function of the user is called.

    Returns:
        Float64 [N] of each direction.

    Raises:
        LossError, ConfigError: as `token_coefficients`.
    """
    if name in LOSSES:
        return [losses.influence(LOSSES[name], batch, pair) for pair in pairs]
    shapes = {str(number): batch.weights_N.shape for number in range(len(pairs))}
    found = _called_apart(isolation, name, _influences_apart, (name, batch, list(pairs)), shapes)
    if not all(torch.isfinite(influence_N).all() for influence_N in found.values()):
        raise LossError(
            f"the second derivative of loss {name!r} is not finite, in {source_file(name)}",
            cause="a division by zero, or a root of zero",
            fix="bound what is divided by, as in batch.lengths_N.clamp_min(1)",
        )
    return [found[number] for number in shapes]


def check_loss(name: str, kl_beta: float, max_new_tokens: int, isolation: Isolation = _DEFAULT_LIMITS) -> None:
    """Refuse a user's loss that cannot be what it is for, on a made-up batch of six short responses.

    Args:
        name: of the loss.
        kl_beta: β of the KL term; 0 for none, and then the batch has no reference.
        max_new_tokens: where a response is cut.
        isolation: how a function of the user is called.

    Raises:
        ConfigError: there is no such function, or a KL term that it leaves out.
        LossError: it fails, does not depend on ℓ, differs from call to call, or sums over responses without their
            weights. Or it passed a limit, or ended its process.
    """
    if name not in LOSSES:
        _called_apart(isolation, name, _check_apart, (name, kl_beta, max_new_tokens), {})


def _pairs_apart(
    isolation: Isolation, name: str, function: Callable[..., bytes | Iterator[bytes]], batches: Sequence[LossBatch]
) -> list[TokenPair]:
    """The coefficients of each batch that a process of a user's function answers."""
    shapes = {f"{i}.{part}": b.logprobs_K.shape for i, b in enumerate(batches) for part in TokenPair._fields}
    found = _called_apart(isolation, name, function, (name, list(batches)), shapes)
    return [TokenPair(*(found[f"{i}.{part}"] for part in TokenPair._fields)) for i in range(len(batches))]


def _called_apart(
    isolation: Isolation,
    name: str,
    function: Callable[..., bytes | Iterator[bytes]],
    arguments: tuple[Any, ...],
    shapes: Mapping[str, torch.Size],
) -> dict[str, Tensor]:
    """The tensors that a process of a user's function answers: float64, of these names and shapes."""
    numbers = sum(shape.numel() for shape in shapes.values())
    answer = isolation.call(
        _with_threads,
        function,
        torch.get_num_threads(),
        *arguments,
        whose=f"loss {name!r}",
        file=str(source_file(name)),
        error=LossError,
        largest=2**16 + 256 * len(shapes) + 8 * numbers,
        parts=1 + len(shapes),
    )
    found: dict[str, Tensor] = {}
    with suppress(SafetensorError, ValueError, KeyError, RuntimeError):  # whatever else came
        found = safetensors.load(answer)
    if {key: (t.shape, t.dtype) for key, t in found.items()} != {k: (s, torch.float64) for k, s in shapes.items()}:
        raise LossError(
            f"what was made of loss {name!r} did not arrive as {numbers} numbers, in {source_file(name)}",
            cause="it changes functions of Python or torch",
            fix=SIGNATURE,
        )
    return found


def _with_threads(
    function: Callable[..., bytes | Iterator[bytes]], threads: int, *arguments: Any
) -> bytes | Iterator[bytes]:
    """Sums are taken in as many parts as there are threads: with as many as in the sweep's own process they agree."""
    torch.set_num_threads(threads)
    return function(*arguments)


def _coefficients_apart(name: str, batches: Sequence[LossBatch]) -> bytes:
    loss = load_loss(name)
    return _answer([functions.coefficients_of(name, loss, batch) for batch in batches])


def _coefficients_of_each_apart(name: str, batches: Sequence[LossBatch]) -> Iterator[bytes]:
    loss, found = load_loss(name), []
    for batch in batches:
        try:
            found.append(functions.coefficients_of(name, loss, batch))
        except Exception as error:  # also one that a backward function of the user raises
            print(one_line(error))
            found.append(TokenPair(*(torch.full_like(batch.logprobs_K, torch.nan) for _ in TokenPair._fields)))
        yield b""
    yield _answer(found)


def _answer(pairs: Sequence[TokenPair]) -> bytes:
    return safetensors.save(_plain({f"{i}.{part}": t for i, p in enumerate(pairs) for part, t in p._asdict().items()}))


def _influences_apart(name: str, batch: LossBatch, pairs: Sequence[TokenPair]) -> Iterator[bytes]:
    loss, found = load_loss(name), []
    for pair in pairs:
        found += functions.influences_of(name, loss, batch, [pair])
        yield b""
    yield safetensors.save(_plain({str(number): influence_N for number, influence_N in enumerate(found)}))


def _check_apart(name: str, kl_beta: float, max_new_tokens: int) -> bytes:
    functions.check_loss(name, kl_beta, max_new_tokens)
    return safetensors.save({})


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without shared memory, which safetensors refuses."""
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}

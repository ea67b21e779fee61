"""An intervention of the user's own: a function from U to a factor for the policy term of every token.

    def weights(batch: LossBatch) -> torch.Tensor       a tensor [K], see `numerics.loss_batch.LossBatch`

It is called in a process of its own, see `isolation`, and on a made-up batch before anything expensive runs.
"""

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from entropy_core.errors import LossError, ProbeError, one_line
from entropy_core.files import functions as user_functions
from entropy_core.isolation.process import Isolation
from entropy_core.losses.functions import made_up_batch
from entropy_core.numerics.loss_batch import LossBatch

SIGNATURE = "write def weights(batch): … that returns a tensor with one number for each of batch.logprobs_K"
WHAT = "intervention"


def source_file(name: str) -> Path:
    """The file that a user's intervention is in. Raises ConfigError where there is none."""
    file = user_functions.source_file(WHAT, name, {})
    assert file is not None
    return file


def token_weights(name: str, batch: LossBatch, isolation: Isolation) -> Tensor:
    """Call a user's function.

    Args:
        name: `file.py:function` or `package.module:function`.
        batch: U.
        isolation: how a function of the user is called.

    Returns:
        The factors, float64 [K].

    Raises:
        LossError: it fails, passes a limit, or returns anything but one finite number for each token.
        ConfigError: there is no such function.
    """
    count = len(batch.logprobs_K)
    file = source_file(name)
    answer = isolation.call(
        _called, name, batch, whose=f"{WHAT} {name!r}", file=str(file), error=LossError, largest=2**16 + 8 * count
    )
    with suppress(SafetensorError, ValueError, KeyError, RuntimeError):  # whatever else came
        found = safetensors.load(answer)["weights"]
        if found.shape == (count,) and found.dtype == torch.float64 and torch.isfinite(found).all():
            return found
    raise LossError(f"{WHAT} {name!r} did not give {count} finite numbers, in {file}", fix=SIGNATURE)


def check_token_weights(name: str, max_new_tokens: int, isolation: Isolation) -> None:
    """Refuse a user's intervention that cannot be one, on a made-up batch of six short responses."""
    token_weights(name, made_up_batch(0.0, max_new_tokens), isolation)


def _called(name: str, batch: LossBatch) -> bytes:
    function, file = user_functions.load(WHAT, name, {}), source_file(name)
    try:
        found = function(batch)
    except ProbeError:
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        line = user_functions.line_of(error, file) or user_functions.first_line_of(function, file)
        raise LossError(
            f"{WHAT} {name!r} raised {type(error).__name__}: {one_line(error)} at {line}", fix=SIGNATURE
        ) from error
    if not isinstance(found, Tensor) or found.shape != batch.logprobs_K.shape:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise LossError(f"{WHAT} {name!r} returned {shape}, in {file}", fix=SIGNATURE)
    return safetensors.save({"weights": found.detach().double().contiguous().clone()})

"""The loss that `update.loss` names: one of `numerics.losses`, or a function of the user.

    def loss(batch: LossBatch) -> torch.Tensor          a float64 scalar, see `numerics.loss_batch.LossBatch`

A user's function is checked on a made-up batch before anything expensive runs, and what it returns is checked whenever
it is called: nothing becomes a gradient that is not one. All of it happens in a process of its own, see `apart`.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_core.errors import ConfigError, LossError, ProbeError, one_line
from entropy_core.files import functions as user_functions
from entropy_core.numerics import losses, ragged
from entropy_core.numerics.functional import TokenPair
from entropy_core.numerics.loss_batch import LossBatch, Objective
from entropy_core.numerics.losses import LOSSES, LossFunction

SIGNATURE = "write def loss(batch): … that returns a scalar tensor made of batch.logprobs_K"


def source_file(name: str) -> Path | None:
    """The file that a loss is looked up in; None for one of this package, which is part of the code digest.

    Raises:
        ConfigError: there is no such function, or no such file.
    """
    return user_functions.source_file("loss", name, LOSSES)


def load_loss(name: str) -> LossFunction:
    """A loss by its name in `LOSSES`, by `package.module:function`, or by `file.py:function`; loads code of the user.

    Args:
        name: of the loss.

    Returns:
        The function. That of a user raises LossError, with the file and the line, where it fails or does not return a
        finite scalar that can be differentiated.

    Raises:
        ConfigError: there is no such function.
    """
    if name in LOSSES:
        return LOSSES[name]
    function, file = user_functions.load("loss", name, LOSSES), source_file(name)
    assert file is not None
    first_line = user_functions.first_line_of(function, file)

    def loss(batch: LossBatch) -> Tensor:
        try:
            value = function(batch)
        except ProbeError:
            raise
        except (Exception, SystemExit) as error:  # user code may raise anything
            line = user_functions.line_of(error, file) or first_line
            raise LossError(
                f"loss {name!r} raised {type(error).__name__}: {one_line(error)} at {line}", fix=SIGNATURE
            ) from error
        fault = _fault(value)
        if fault:
            raise LossError(f"loss {name!r} {fault}, in {first_line}", fix=SIGNATURE)
        return value

    return loss


def coefficients_of(name: str, loss: LossFunction, batch: LossBatch) -> TokenPair:
    """`losses.coefficients`, all of them finite.

    Args:
        name: of the loss, for a message.
        loss: of `load_loss`.
        batch: U.

    Returns:
        ∂L/∂ℓ_k and ∂L/∂h_k.

    Raises:
        LossError: there is no gradient, or a number in it is not finite; names the response.
    """
    try:
        found = losses.coefficients(loss, batch)
    except RuntimeError as error:
        raise LossError(
            f"loss {name!r} cannot be differentiated ({one_line(error)})",
            cause="a tensor that was changed in place, or an operation of its own without a derivative",
            fix="use torch's operations, and leave the tensors of the batch as they are",
        ) from error
    return require_finite(name, found, batch)


def influences_of(name: str, loss: LossFunction, batch: LossBatch, pairs: Sequence[TokenPair]) -> list[Tensor]:
    """`losses.influence` along several directions.

    Args:
        name: of the loss, for a message.
        loss: of `load_loss`.
        batch: U.
        pairs: a_k and b_k of each direction.

    Returns:
        Float64 [N] of each direction.

    Raises:
        LossError: there is no second derivative.
    """
    try:
        return [losses.influence(loss, batch, pair) for pair in pairs]
    except RuntimeError as error:
        raise LossError(
            f"loss {name!r} cannot be differentiated twice ({one_line(error)})",
            cause="an operation of its own without a second derivative",
            fix="use torch's operations",
        ) from error


def require_finite(name: str, found: TokenPair, batch: LossBatch) -> TokenPair:
    """Refuse coefficients that are not finite, with a LossError that names the response."""
    bad_K = ~(torch.isfinite(found.logprob_K) & torch.isfinite(found.entropy_K))
    if bad_K.any():
        i = int(ragged.sequence_index(batch.offsets_N1)[bad_K][0])
        raise LossError(
            f"the gradient of loss {name!r} is not finite in {int(bad_K.sum())} tokens, the first in response {i} "
            f"(advantage {float(batch.advantages_N[i]):g}, {int(batch.lengths_N[i])} tokens)",
            cause="a division by zero, a logarithm or a root of zero, or an exponential that overflows",
            fix="bound what is divided by, as in batch.lengths_N.clamp_min(1)",
        )
    return found


def check_loss(name: str, kl_beta: float, max_new_tokens: int) -> None:
    """Refuse a user's loss that cannot be what it is for, on a made-up batch of six short responses.

    Args:
        name: of the loss.
        kl_beta: β of the KL term; 0 for none, and then the batch has no reference.
        max_new_tokens: where a response is cut.

    Raises:
        ConfigError: there is no such function, or a KL term that it leaves out.
        LossError: it fails, does not depend on ℓ, differs from call to call, or sums over responses without their
            weights.
    """
    where = f"in {source_file(name)}"
    loss, batch = load_loss(name), made_up_batch(kl_beta, max_new_tokens)
    found = coefficients_of(name, loss, batch)
    if not found.logprob_K.any():
        raise LossError(
            f"loss {name!r} does not depend on the log-probabilities, {where}",
            cause="it uses them detached, as numbers, or not at all",
            fix=SIGNATURE,
        )
    again = losses.coefficients(loss, batch)
    if not all(map(torch.equal, found, again)):
        raise LossError(
            f"loss {name!r} gave two gradients for one batch, {where}",
            cause="it draws random numbers, or keeps something from one call to the next",
            fix="make it a function of the batch alone",
        )
    if kl_beta and not _depends_on_reference(loss, batch):
        raise ConfigError(
            f"update.kl_beta is {kl_beta:g}, and loss {name!r} makes no use of the reference policy, {where}",
            fix="add batch.kl_beta * losses.kl(batch) to it, or leave kl_beta out",
        )
    _check_weights(name, loss, batch, where)


def _check_weights(name: str, loss: LossFunction, batch: LossBatch, where: str) -> None:
    """A prompt whose responses have the weight 2 must act as two prompts that have the same responses."""
    first_N = batch.prompts_N == 0
    twice_N = torch.where(first_N, 2.0, 1.0).double()
    chosen_M = torch.cat([torch.arange(len(first_N)), first_N.nonzero().squeeze(1)])
    repeated, pick_K = _with_responses(batch, chosen_M)
    along = TokenPair(*torch.linspace(1, 40, 2 * len(batch.logprobs_K)).double().sin().view(2, -1))
    weighted = losses.coefficients(loss, replace(batch, weights_N=twice_N)).dot(along).sum()
    expected = losses.coefficients(loss, repeated).dot(TokenPair(*(values_K[pick_K] for values_K in along))).sum()
    if not torch.isclose(weighted, expected, rtol=1e-9, atol=1e-12):
        raise LossError(
            f"loss {name!r} does not count a response of weight 2 as two responses, {where}",
            cause="a sum over responses that leaves batch.weights_N out, or a division by a number of its own",
            fix="sum the tokens of a response with batch.sequence_sum, go from responses to one number with "
            "batch.mean, and divide by batch.mean(batch.lengths_N) for a mean over tokens",
        )
    influences_of(name, loss, batch, [along])


def _with_responses(batch: LossBatch, chosen_M: Tensor) -> tuple[LossBatch, Tensor]:
    """These responses, each with the weight 1, as a part of as many as ever were drawn; a second copy is of a prompt of
    its own. And the token that each token was."""
    copies_M = torch.arange(len(chosen_M)) >= len(batch.prompts_N)
    return replace(
        batch.select(chosen_M),
        prompts_N=batch.prompts_N[chosen_M] + copies_M * (batch.prompts_N.max() + 1),
        weights_N=torch.ones(len(chosen_M), dtype=torch.float64),
        responses=batch.responses,
    ), ragged.token_index(batch.offsets_N1, chosen_M)


def _depends_on_reference(loss: LossFunction, batch: LossBatch) -> bool:
    assert batch.reference_logprobs_K is not None
    reference_K = batch.reference_logprobs_K.clone().requires_grad_()
    value = loss(replace(batch, logprobs_K=batch.logprobs_K.clone().requires_grad_(), reference_logprobs_K=reference_K))
    (gradient_K,) = torch.autograd.grad(value, reference_K, materialize_grads=True)
    return bool(gradient_K.any())


def made_up_batch(kl_beta: float, max_new_tokens: int) -> LossBatch:
    """Three prompts with two responses each, of one to five tokens."""
    lengths_N = torch.tensor([3, 1, 4, 2, 1, 5]).clamp_max(max_new_tokens)
    count = int(lengths_N.sum())
    steps_K = torch.arange(1, count + 1, dtype=torch.float64)
    rewards_PG = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 1.0]], dtype=torch.float64)
    return LossBatch.on_policy(
        logprobs_K=-1.0 - steps_K.sin(),
        entropies_K=1.5 + steps_K.cos(),
        offsets_N1=ragged.offsets_from_lengths(lengths_N),
        advantages_PG=rewards_PG - rewards_PG.mean(1, keepdim=True),
        rewards_PG=rewards_PG,
        max_new_tokens=max_new_tokens,
        reference_logprobs_K=-1.2 - (2 * steps_K).sin() if kl_beta else None,
        objective=Objective(kl_beta=kl_beta),
    )


def _fault(value: Any) -> str:
    """What is wrong with what a loss returned; empty for a scalar that can be differentiated."""
    if not isinstance(value, Tensor):
        return f"returned {type(value).__name__}, not a tensor"
    if value.ndim:
        return f"returned a tensor of shape {list(value.shape)}, not a scalar"
    if not torch.isfinite(value):
        return f"returned {value.item()}"
    return "" if value.requires_grad else "returned a number that depends on neither log-probabilities nor entropies"

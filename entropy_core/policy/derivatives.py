"""Forward mode: log-probabilities ℓ and entropies h of a micro-batch, and their derivatives along a direction v."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call, jvp

from entropy_core.errors import CheckpointError, one_line
from entropy_core.numerics.direct_derivatives import DirectDerivatives
from entropy_core.numerics.token_statistics import TokenDerivatives, TokenStatistics
from entropy_core.numerics.vectors import Block
from entropy_core.policy.model import Policy
from entropy_core.policy.scorer import TeacherForcedRows


def as_tangent(direction: Mapping[str, Tensor], policy: Policy) -> dict[str, Tensor]:
    """Cast a direction to the dtype and device of the policy's parameters."""
    parameters = policy.named_parameters()
    return {name: v.to(parameters[name]) for name, v in direction.items()}


def tangent_of(direction: Mapping[Block, Tensor], policy: Policy) -> dict[str, Tensor]:
    """Assemble a direction given in blocks, in the shapes and dtypes and on the devices of the policy's parameters."""
    tangent = {
        name: torch.empty(p.shape, dtype=p.dtype, device=p.device) for name, p in policy.named_parameters().items()
    }
    flat = {name: tensor.view(-1) for name, tensor in tangent.items()}
    for (name, start, stop), values in direction.items():
        flat[name][start:stop] = values
    return tangent


def token_derivatives(
    policy: Policy, rows: TeacherForcedRows, direction: Mapping[str, Tensor], temperature: float
) -> TokenDerivatives:
    """Compute ℓ, h and their derivatives along `direction` in one forward-mode pass.

    Args:
        policy: the policy.
        rows: the micro-batch, with K scored tokens.
        direction: v by parameter name, in the policy's dtype and on its device; other parameters are constants.
        temperature: sampling temperature τ.

    Returns:
        ℓ and h (nats) and their derivatives (nats per unit of v), each [K].

    Raises:
        CheckpointError: the architecture contains an operation without a forward-mode derivative.
    """
    parameters = policy.named_parameters()
    primal = {f"model.{name}": parameters[name].detach() for name in direction}  # the others are constants
    tangent = {f"model.{name}": v for name, v in direction.items()}

    def statistics(parameters: dict[str, Tensor]) -> TokenStatistics:
        return functional_call(policy.scorer, parameters, (rows, temperature))

    with torch.no_grad(), DirectDerivatives():
        try:
            values, derivatives = jvp(statistics, (primal,), (tangent,))[:2]
        except RuntimeError as error:
            if "forward AD" not in str(error) and "functorch" not in str(error):
                raise
            raise CheckpointError(
                f"{type(policy.model).__name__} has no forward-mode derivative: {one_line(error)}",
                cause="a custom operation that defines a backward pass but no forward-mode derivative",
                fix="use an implementation of the model that is made of torch's own operations only",
            ) from error
    return TokenDerivatives(*values, *derivatives)

"""Forward mode: ℓ and h of a micro-batch with their derivatives along a direction."""

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
    """A direction in the dtype and on the device of the policy's parameters."""
    parameters = policy.named_parameters()
    return {name: v.to(parameters[name]) for name, v in direction.items()}


def tangent_of(direction: Mapping[Block, Tensor], policy: Policy) -> dict[str, Tensor]:
    """The same of a direction that comes in blocks."""
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
    """ℓ, h and their derivatives along `direction`, from one forward-mode pass.

    Args:
        policy: the policy.
        rows: the micro-batch.
        direction: v by parameter name, of the policy's dtype and device.
        temperature: τ.

    Returns:
        `TokenDerivatives`, each [K].
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
                cause="an operation that brings its own gradient, and no derivative in the forward direction",
                fix="probe an architecture that is made of torch's own operations; most are",
            ) from error
    return TokenDerivatives(*values, *derivatives)

"""Forward mode: log-probabilities ℓ and entropies h of a micro-batch, and their derivatives along a direction v."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from entropy_core.errors import CheckpointError, one_line
from entropy_core.numerics.choices import Arithmetic
from entropy_core.numerics.direct_derivatives import DirectDerivatives
from entropy_core.numerics.token_statistics import TokenDerivatives
from entropy_core.numerics.vectors import Block, squares
from entropy_core.policy.arithmetic import computing_in
from entropy_core.policy.attention import attention_set
from entropy_core.policy.blockwise import forward_mode_attention
from entropy_core.policy.model import Policy
from entropy_core.policy.scorer import TeacherForcedRows


def as_tangent(direction: Mapping[str, Tensor], policy: Policy) -> dict[str, Tensor]:
    """Cast a direction to the dtype and device of the policy's parameters."""
    parameters = policy.named_parameters()
    return {name: v.to(parameters[name]) for name, v in direction.items()}


def scaled_tangent_of(direction: Mapping[Block, Tensor], policy: Policy) -> tuple[dict[str, Tensor], float]:
    """Assemble a direction given in blocks, in the shapes and dtypes and on the devices of the policy's parameters.

    It is divided by about its norm, so that narrow dtypes can hold it: by a power of two, since that rounds nothing.
    Each block is computed once.

    Args:
        direction: v in blocks, float64.
        policy: the policy.

    Returns:
        v/s by parameter name, and s; 1 for a direction of zeros.
    """
    parameters, total = policy.named_parameters(), 0.0
    wide = {
        name: torch.empty(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        for name, p in parameters.items()
    }
    flat = {name: tensor.view(-1) for name, tensor in wide.items()}
    for (name, start, stop), values in direction.items():
        flat[name][start:stop] = values
        total += squares(values)
    scale = 2.0 ** round(math.log2(total) / 2) if total else 1.0
    flat.clear()
    return {name: wide.pop(name).div_(scale).to(p.dtype) for name, p in parameters.items()}, scale


def token_derivatives(
    policy: Policy,
    rows: TeacherForcedRows,
    direction: Mapping[str, Tensor],
    temperature: float,
    arithmetic: Arithmetic = "full",
) -> TokenDerivatives:
    """Compute ℓ, h and their derivatives along `direction` in one forward-mode pass.

    Dual tensors take the place of the parameters. `torch.func.jvp` gives the same bits through wrappers that take
    several times as long as a GPU takes for the operation itself.

    Args:
        policy: the policy.
        rows: the micro-batch, with K scored tokens.
        direction: v by parameter name, in the policy's dtype and on its device; other parameters are constants.
        temperature: sampling temperature τ.
        arithmetic: of the trunk.

    Returns:
        ℓ and h (nats) and their derivatives (nats per unit of v), each [K].

    Raises:
        CheckpointError: the architecture contains an operation without a forward-mode derivative.
    """
    differentiable = attention_set(policy.model, forward_mode_attention(policy))
    cheaper = computing_in(arithmetic, policy.device)
    with torch.no_grad(), differentiable, cheaper, DirectDerivatives(), forward_ad.dual_level():
        parameters = policy.named_parameters()
        dual = {name: forward_ad.make_dual(parameters[name].detach(), v) for name, v in direction.items()}
        in_place = {place: dual[name] for place, name in policy.places.items() if name in dual}
        try:
            statistics = functional_call(policy.scorer, in_place, (rows, temperature), tie_weights=False)
        except RuntimeError as error:
            if "forward AD" not in str(error) and "forward mode AD" not in str(error):
                raise
            raise CheckpointError(
                f"{type(policy.model).__name__} has no forward-mode derivative: {one_line(error)}",
                cause="a custom operation that defines a backward pass but no forward-mode derivative",
                fix="use an implementation of the model that is made of torch's own operations only",
            ) from error
        (logprobs_K, dlogprobs_K), (entropies_K, dentropies_K) = map(forward_ad.unpack_dual, statistics)
    zeros_K = torch.zeros_like(logprobs_K)  # of what does not depend on θ there is no tangent
    return TokenDerivatives(
        logprobs_K,
        entropies_K,
        zeros_K if dlogprobs_K is None else dlogprobs_K,
        zeros_K if dentropies_K is None else dentropies_K,
    )

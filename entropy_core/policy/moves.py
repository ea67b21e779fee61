"""Contexts in which the policy's parameters are replaced by others."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from entropy_core.policy.model import BLOCK, Policy


def moved(policy: Policy, direction: Mapping[str, Tensor], eta: float) -> AbstractContextManager[None]:
    """Return a context in which the parameters are θ + η·v, computed in float64 and rounded to the policy's dtype.

    On exit, θ is restored bit for bit.

    Args:
        policy: the policy.
        direction: step v by parameter name; each tensor is read once.
        eta: step size η.
    """
    rooms: dict[torch.device, Tensor] = {}  # one, unless layers are split

    def displaced(name: str, theta: Tensor, to: Tensor) -> None:
        device = theta.device
        v = direction[name].to(device).reshape(-1)
        if device not in rooms:
            rooms[device] = torch.empty(BLOCK, dtype=torch.float64, device=device)
        for block, start, step in zip(to.split(BLOCK), theta.split(BLOCK), v.split(BLOCK), strict=True):
            block.copy_(rooms[device][: len(step)].copy_(step).mul_(eta).add_(start))

    return _replaced(policy, direction, displaced)


def jittered(policy: Policy, seed: int) -> AbstractContextManager[None]:
    """Return a context in which every parameter moves to the next floating-point number, up or down at random.

    This changes only the rounding errors of the computation. Frozen parameters are moved as well, because they take
    part in it. On exit, all parameters are restored.

    Args:
        policy: the policy.
        seed: seed of the random signs.
    """
    generator = torch.Generator().manual_seed(seed)

    def neighbour(_: str, theta: Tensor, to: Tensor) -> None:
        for block, start in zip(to.split(BLOCK), theta.split(BLOCK), strict=True):
            up = torch.randint(0, 2, start.shape, generator=generator, dtype=torch.bool).to(theta.device)
            torch.nextafter(start, torch.where(up, torch.inf, -torch.inf).to(start), out=block)

    return _replaced(policy, dict(policy.model.named_parameters()), neighbour)


@contextmanager
def _replaced(policy: Policy, names: Iterable[str], fill: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Context in which named parameters have other values, in separate buffers.

    On a CPU the buffers are kept for reuse, because allocating them takes several times as long as filling them.

    Args:
        policy: the policy.
        names: names of the parameters to replace.
        fill: called with a name, the flat θ, and the flat buffer that it fills with the new values.
    """
    place, policy.spare = policy.spare, {}  # a nested context allocates its own buffers
    parameters = dict(policy.model.named_parameters())
    own = {name: parameters[name].data for name in names}
    try:
        with torch.no_grad():
            for name, theta in own.items():
                if name not in place:
                    place[name] = torch.empty_like(theta, memory_format=torch.contiguous_format)
                fill(name, theta.reshape(-1), place[name].view(-1))
                parameters[name].data = place[name]
        yield
    finally:
        for name, theta in own.items():
            parameters[name].data = theta
    if policy.device.type == "cpu":
        policy.spare = place

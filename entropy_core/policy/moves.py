"""The policy at other parameters, for as long as a context lasts."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from entropy_core.policy.model import BLOCK, Policy


def moved(policy: Policy, direction: Mapping[str, Tensor], eta: float) -> AbstractContextManager[None]:
    """Within the context the parameters are θ + η·v, computed in float64 and rounded; afterwards θ, bit for bit.

    Args:
        policy: the policy.
        direction: v by parameter name; each tensor is asked for once.
        eta: η.
    """
    room = torch.empty(BLOCK, dtype=torch.float64, device=policy.device)

    def displaced(name: str, theta: Tensor, to: Tensor) -> None:
        v = direction[name].to(theta.device).reshape(-1)
        for block, start, step in zip(to.split(BLOCK), theta.split(BLOCK), v.split(BLOCK), strict=True):
            block.copy_(room[: len(step)].copy_(step).mul_(eta).add_(start))

    return _replaced(policy, direction, displaced)


def jittered(policy: Policy, seed: int) -> AbstractContextManager[None]:
    """Within the context every parameter is the next number above or below it, at random; afterwards θ again.

    Nothing has changed but the rounding errors of everything that is computed; the frozen parameters, which take
    part in all of it, are moved as well.

    Args:
        policy: the policy.
        seed: of the signs.
    """
    generator = torch.Generator().manual_seed(seed)

    def neighbour(_: str, theta: Tensor, to: Tensor) -> None:
        for block, start in zip(to.split(BLOCK), theta.split(BLOCK), strict=True):
            up = torch.randint(0, 2, start.shape, generator=generator, dtype=torch.bool).to(theta.device)
            torch.nextafter(start, torch.where(up, torch.inf, -torch.inf).to(start), out=block)

    return _replaced(policy, dict(policy.model.named_parameters()), neighbour)


@contextmanager
def _replaced(policy: Policy, names: Iterable[str], fill: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Within the context parameters have other values, in memory of their own.

    On a CPU that memory is kept for the next time: new memory takes several times what an update of it takes.

    Args:
        policy: the policy.
        names: of the parameters.
        fill: given a name and θ, flat, writes the other values to where they belong.
    """
    place, policy.spare = policy.spare, {}  # one within this one takes memory of its own
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

"""real-step: the trainer's step between two checkpoints, and what its parts do to the entropy, to first order."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entropy_core.checkpoints.optimizer_step import OptimizerStep
from entropy_core.errors import CheckpointError
from entropy_core.numerics.halves import HALVES, KINDS, of_all
from entropy_core.numerics.vectors import Lazy, blocks_of, in_blocks
from entropy_core.policy.spec import PolicySpec, policy_of

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer
    from entropy_core.store.inputs import Checkpoint, Gradient, Update

PARTS = ("gradient", "momentum", "decay", "rounding", "rest")
"""What the change of the weights is split into, in the order of `products`."""


def real_step(
    out: "Writer",
    execution: "Execution",
    *,
    policy: PolicySpec,
    after: PolicySpec,
    checkpoint: "Checkpoint",
    update: "Update",
    gradient: "Gradient",
) -> dict[str, Any]:
    """Split the change of the weights, θ' − θ, and take the inner products of its parts with ∇H.

        θ' − θ = lr·(gradient + momentum + decay) + rounding + rest

    The first three are the step on U in exact arithmetic. The rounding is what the optimizer's own arithmetic in the
    dtype of the weights adds to it; the rest is what the weights did besides.

    Args:
        out: receives the vector `direction`, (θ' − θ)/lr by parameter name, float64.
        execution: device, and where `optimizer.pt` is.
        policy: θ.
        after: θ', of the next checkpoint.
        checkpoint: artifact of load-checkpoint.
        update: artifact of compute-update.
        gradient: artifact of entropy-gradient.

    Returns:
        `products`: by kind of ∇ (entropy and length) that of θ' − θ and those of its parts, nats or tokens; `rest`,
        ‖rest‖/‖θ' − θ‖; `halves` of entropy-gradient; and the learning rate.

    Raises:
        CheckpointError: the two checkpoints have other parameters.
    """
    learning_rate, clip = float(checkpoint.summary["learning_rate"]), update.summary["clip_factor"]
    later = {
        name: parameter.detach().clone() for name, parameter in policy_of(after, execution).named_parameters().items()
    }
    model = policy_of(policy, execution)
    parameters = model.named_parameters()
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes != {name: tuple(parameter.shape) for name, parameter in later.items()}:
        raise CheckpointError(
            "the next checkpoint has other parameters than the one before it",
            cause="they are of two runs",
            fix="set post_mortem: false, or probe checkpoints of one run",
        )
    blocks, stored = blocks_of(parameters), update.vector("gradient")
    theta, theta_later = in_blocks(parameters), in_blocks(later)
    loss_gradient = {block: stored.block(block).to(model.device_of[block.name]).double() for block in blocks}
    step = OptimizerStep(checkpoint, execution, parameters, loss_gradient, clip)
    parts = [step.part(name) for name in PARTS[:3]]
    rounded = update.vector("direction")
    taken = step.stored(Lazy(blocks, rounded.block))
    halves = gradient.summary["halves"]
    covectors = [[gradient.vector(f"{kind}_{half}") for half in HALVES] for kind in KINDS]
    products = torch.zeros(len(KINDS), 1 + len(PARTS), dtype=torch.float64)
    squares = torch.zeros(2, dtype=torch.float64)  # of the change, and of the rest
    with out.vector("direction", shapes, torch.float64) as direction:
        for block in blocks:
            change = theta_later[block].double() - theta[block].double()
            of_step = [learning_rate * part[block] for part in parts]
            exact = sum(of_step[1:], start=of_step[0])
            rounding = learning_rate * taken[block] - exact
            rest = change - exact - rounding
            direction.write(block, change / learning_rate)
            split: list[Tensor] = [change, *of_step, rounding, rest]
            squares += torch.stack([(x * x).sum() for x in (change, rest)]).cpu()
            for kind, of_halves in enumerate(covectors):
                dH = of_all(halves, [file.block(block).to(model.device_of[block.name]).double() for file in of_halves])
                products[kind] += torch.stack([(x * dH).sum() for x in split]).cpu()
    whole, of_rest = squares.sqrt().tolist()
    return {
        "products": {kind: row.tolist() for kind, row in zip(KINDS, products, strict=True)},
        "rest": of_rest / whole if whole else 0.0,
        "halves": halves,
        "learning_rate": learning_rate,
    }

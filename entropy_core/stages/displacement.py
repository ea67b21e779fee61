"""displacement: how far the rounding of θ + ηv to the policy's number format takes it from where it should be."""

from typing import TYPE_CHECKING, Any

from entropy_core.numerics import adamw
from entropy_core.policy import displaced
from entropy_core.stages.sequences import Law, policy_of

if TYPE_CHECKING:
    from entropy_core.artifact import Artifact, Writer
    from entropy_core.execution import Execution


def displacement(
    out: "Writer", execution: "Execution", *, law: Law, update: "Artifact", gradient: "Artifact", eta: float
) -> dict[str, Any]:
    """What the rounding error r = fl(θ + ηv) − θ − ηv does to the entropy, to first order: ⟨∇H, r⟩.

    At a small step size r is no longer small beside ηv, and ΔH measures the step that was taken, not ηv.

    Args:
        out: `displacement.json`, the summary.
        execution: device.
        law: the policy at θ.
        update: artifact of compute-update.
        gradient: artifact of entropy-gradient.
        eta: absolute step size.

    Returns:
        ⟨∇H, r⟩ for both normalisations, in nats, and ‖r‖/‖ηv‖.
    """
    parameters = policy_of(law, execution).named_parameters()
    direction = update.tensors("direction.safetensors")
    rounding = {}
    for name, v in direction.items():
        theta = parameters[name].detach().cpu()
        rounding[name] = displaced(theta, v, eta).double() - theta.double() - eta * v.double()
    step = abs(eta) * adamw.global_norm(direction)
    summary = {"relative": adamw.global_norm(rounding) / step if step else 0.0}
    for normalization in ("per_token", "per_sequence"):
        entropy_gradient = gradient.tensors(f"{normalization}.safetensors")
        summary[normalization] = adamw.dot(rounding, entropy_gradient)
    out.json(summary, "displacement.json")
    return summary

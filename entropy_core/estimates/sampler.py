"""What is reported of the law q that drew E, and whether it is the law that was recorded.

The mean weight from q to the policy has the expectation 1, and the mean score and the mean excess surprisal 0, only if
E was drawn from the recorded law and scored with the policy. `numerics.sampling` has the reasons.
"""

from entropy_core.estimates import pareto
from entropy_core.estimates.evaluation import EvaluationBatch
from entropy_core.estimates.selection import Row
from entropy_core.numerics import importance, uncertainty
from entropy_core.numerics.uncertainty import Estimate
from entropy_core.numerics.verdicts import MINIMUM_ESS_FRACTION

LARGEST_Z = 4.0
"""Largest |z| of the mean weight, score and excess surprisal: by chance one in 16,000 is beyond, more in a skewed E."""


def describe_sampler(batch: EvaluationBatch) -> Row:
    """Compute the columns of the law that drew E.

    Args:
        batch: E.

    Returns:
        Columns of `estimate_columns.ESTIMATES`.
    """
    sampling, N = batch.sampling, len(batch)
    weight = uncertainty.mean(sampling.weights_N)
    return {
        "sampler": "proposal" if batch.from_proposal else "policy",
        "sampler_ess_fraction": importance.effective_sample_size(sampling.weights_N) / N,
        "sampler_ess_prefix": sampling.ess_prefix,
        "sampler_pareto_k": pareto.pareto_k(sampling.weights_N) if batch.from_proposal else None,
        "mean_weight": weight.value,
        "mean_weight_z": _z(batch, Estimate(weight.value - 1.0, weight.influence_N)),
        "mean_score_z": _z(batch, uncertainty.mean(sampling.score_N)),
        "mean_surprisal_z": _z(batch, uncertainty.mean(sampling.surprisal_N)),
        "mean_logprob_difference": sampling.difference_sum / sampling.tokens,
        "largest_logprob_difference": sampling.largest_difference,
    }


def unusable(row: Row) -> str:
    """Say why estimates from this E cannot be trusted.

    Args:
        row: columns of `describe_sampler`.

    Returns:
        The reason; empty if nothing speaks against it, or if the policy drew E, where there are no weights.
    """
    if row["sampler"] == "policy":
        return ""
    checks = {"mean weight": "1", "mean score": "0", "mean surprisal": "the entropy"}
    z_of = {name: row[f"{name.replace(' ', '_')}_z"] for name in checks}
    if wrong := {name: z for name, z in z_of.items() if abs(z) > LARGEST_Z}:
        found = " and ".join(f"the {name} is {abs(z):.0f} SE from {checks[name]}" for name, z in wrong.items())
        return f"E was not drawn from the recorded distribution ({found})"
    if row["sampler_ess_fraction"] < MINIMUM_ESS_FRACTION:
        return (
            f"the weights of E are too uneven (ESS/N = {row['sampler_ess_fraction']:.2f}); lower "
            "generation.proposal_share, or set generation.proposal_temperature closer to the policy's"
        )
    return ""


def _z(batch: EvaluationBatch, estimate: Estimate) -> float:
    error = batch.standard_error(estimate)
    return estimate.value / error if error else 0.0

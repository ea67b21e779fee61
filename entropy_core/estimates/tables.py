"""Schemas of the result tables, with the unit and the meaning of every column in the field metadata."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from entropy_core.estimates.fields import NATS as _H
from entropy_core.estimates.fields import REAL as _REAL
from entropy_core.estimates.fields import TARGETS
from entropy_core.estimates.fields import TEXT as _TEXT
from entropy_core.estimates.fields import WHOLE as _WHOLE
from entropy_core.estimates.fields import field as _field

Row = Mapping[str, Any]


def _ends(prefix: str, quantity: str) -> list[pa.Field]:
    """Both ends of the three intervals of a quantity."""
    what = {"this": TARGETS[1], "mean": TARGETS[2], "next": TARGETS[3]}
    return [
        _field(f"{prefix}{update}_update_{end}", _REAL, _H, f"{side} end of the interval of {quantity} {what[update]}")
        for update in what
        for end, side in (("low", "lower"), ("high", "upper"))
    ]


ESTIMATES = pa.schema(
    [
        _field("eta", _REAL, "learning-rate unit", "absolute step size: the policy moves to theta + eta * v"),
        _field("eta_over_lr", _REAL, "1", "eta as a multiple of the checkpoint's learning rate, as asked for"),
        _field("normalization", _TEXT, "", "per_token: E[S]/E[T]; per_sequence: E[S]"),
        _field(
            "estimator", _TEXT, "", "estimator of delta_h: per_decision, weighted_per_decision, snis or path_integral"
        ),
        _field("H", _REAL, _H, "entropy of the policy, responses cut at max_new_tokens; on E"),
        _field("H_se", _REAL, _H, "standard error of H for this policy: over E"),
        _field(
            "mean_length", _REAL, "tokens", "mean response length on E, the EOS token counted, at most max_new_tokens"
        ),
        _field("delta_h1", _REAL, _H, "predicted change of H, first order: eta times the derivative along v"),
        _field("delta_h1_local", _REAL, _H, "part of delta_h1 at fixed prefixes; changed token choices give the rest"),
        _field("se_given_u", _REAL, _H, "standard error of delta_h1 for this update: over E, with the step held fixed"),
        _field(
            "se_given_u_jackknife", _REAL, _H, "the same for this update by jackknife, one sequence or prompt left out"
        ),
        _field("se_over_u", _REAL, _H, "standard error of delta_h1 for the mean update: over U, with E held fixed"),
        _field(
            "se_over_u_linearised", _REAL, _H, "the same for the mean update if the step were linear in the gradient"
        ),
        _field("se_interaction", _REAL, _H, "E x U interaction for the mean update, in both se_given_u and se_over_u"),
        _field(
            "nonlinearity_over_u", _REAL, "1", "how far steps on halves of U are from averaging to the step; 0: linear"
        ),
        _field("informative_prompts_u", _WHOLE, "prompts", "prompts of U whose responses have unequal rewards"),
        _field("interval_over_e", _TEXT, "", "valid, or: no valid interval over E, and why; then none is given"),
        _field("interval_over_u", _TEXT, "", "valid, or: no valid interval over U, and why; then none is given"),
        *_ends("", "delta_h1"),
        _field(
            "delta_h2",
            _REAL,
            _H,
            "second order: eta^2/2 times the second derivative along v; its variation over U is unknown",
        ),
        _field(
            "delta_h2_se",
            _REAL,
            _H,
            "standard error of delta_h2 for this update: over E, of rounding, and of orders above the second",
        ),
        _field("delta_h2_this_update_low", _REAL, _H, "lower end of the interval of delta_h2 for this update"),
        _field("delta_h2_this_update_high", _REAL, _H, "upper end of the interval of delta_h2 for this update"),
        _field("delta_h2_points", _WHOLE, "", "step sizes, or nodes of path_integral, that delta_h2 comes from"),
        _field("second_order", _TEXT, "", "resolved: the interval of delta_h2 is without 0; unresolved; or none: why"),
        _field("delta_h12", _REAL, _H, "predicted change of H, second order: delta_h1 + delta_h2"),
        _field(
            "delta_h12_se",
            _REAL,
            _H,
            "standard error of delta_h12 for this update: both parts share E; of rounding and higher orders, too",
        ),
        *_ends("delta_h12_", "delta_h12"),
        _field("delta_h12_interval_over_u", _TEXT, "", "as interval_over_u, for the intervals of delta_h12 over U"),
        _field("confidence_level", _REAL, "1", "confidence level of every interval in this row"),
        _field("delta_h", _REAL, _H, "measured change of H, by importance sampling on the same E"),
        _field("delta_h_se", _REAL, _H, "standard error of delta_h for this update: over E, and of rounding"),
        *_ends("delta_h_", "delta_h"),
        _field("curvature", _REAL, _H, "delta_h minus eta times the derivative of the same estimator on the same E"),
        _field("curvature_se", _REAL, _H, "its standard error for this update, and of rounding"),
        _field("paired_difference", _REAL, _H, "delta_h - delta_h1; the curvature when the estimator is per_decision"),
        _field("paired_difference_se", _REAL, _H, "its standard error for this update (both share E), and of rounding"),
        _field("remainder", _REAL, _H, "delta_h - delta_h12: the orders above the second, if the weights are reliable"),
        _field("remainder_se", _REAL, _H, "its standard error for this update (all share E), and of rounding"),
        _field("ess", _REAL, "sequences", "effective sample size of the whole-sequence weights"),
        _field("ess_fraction", _REAL, "1", "ess / n_sequences"),
        _field("ess_prefix", _REAL, "sequences", "smallest effective sample size of the prefix weights at a position"),
        _field("pareto_k", _REAL, "1", "Pareto k of the whole-sequence weights: how heavy their tail is"),
        _field("pareto_k_threshold", _REAL, "1", "largest k at which a mean of that many weights can be trusted"),
        _field(
            "minimum_detectable",
            _REAL,
            _H,
            "smallest |delta_h| of this update that this E detects with probability 80 %",
        ),
        _field(
            "noise_floor",
            _REAL,
            _H,
            "twice the rms of the delta_h that rounding alone produces; 0 for path_integral",
        ),
        _field("p_this_update", _REAL, "1", "p-value of delta_h = 0 for this update (t test)"),
        _field("p_mean_update", _REAL, "1", "p-value of delta_h = 0 for the mean update (t test)"),
        _field("sign_this_update", _TEXT, "", "sign of all of the interval of delta_h for this update, or unknown"),
        _field("sign_mean_update", _TEXT, "", "sign of all of the interval of delta_h for the mean update, or unknown"),
        _field("sign_next_update", _TEXT, "", "sign of all of the interval of delta_h for the next update, or unknown"),
        _field("linearity", _TEXT, "", "|curvature| below 5 % of |delta_h1|: linear; above: nonlinear; or undecided"),
        _field("above_rounding", pa.bool_(), "", "whether |delta_h| is above noise_floor"),
        _field("weights_reliable", pa.bool_(), "", "ESS/N of at least 1/2, and a light tail or nearly equal weights"),
        _field(
            "verdict", _TEXT, "", "reference, weights-unreliable, noise-limited, nonlinear or resolved, in this order"
        ),
        _field("rule", _TEXT, "", "the rule that gave the verdict"),
        _field("n_sequences", _WHOLE, "sequences", "size of E"),
        _field("n_prompts_u", _WHOLE, "prompts", "size of U"),
        _field("inner_product", _REAL, _H, "<grad H, v> by the backward pass, times eta: should equal delta_h1"),
        _field("delta_h1_momentum", _REAL, _H, "part of inner_product from the optimizer's first moment"),
        _field("delta_h1_decay", _REAL, _H, "part of inner_product from weight decay; U's gradient gives the rest"),
        _field("delta_h1_rounding", _REAL, _H, "part of inner_product from the rounding of weights kept in bfloat16"),
        _field("attribution_closure", _REAL, "1", "relative error of the sum of all parts against inner_product"),
        _field("gradient_check", _REAL, "1", "relative difference of <grad H, v> and forward mode, at equal baselines"),
        _field("derivative_check", _REAL, "1", "relative error of central differences against forward mode, if used"),
        _field("unseen_share", _REAL, "1", "expected steps of a response to a token that E never took where it was"),
        _field("unseen_expected", _REAL, "steps", "how many such steps a batch drawn like E should have"),
        _field("unseen_bound", _REAL, "1", "largest entropy that unseen responses can add, relative to that measured"),
        _field("sampler", _TEXT, "", "what drew E: the policy, or a proposal with weights to the policy"),
        _field(
            "sampler_ess_fraction", _REAL, "1", "ESS/N of the whole-sequence weights from what drew E to the policy"
        ),
        _field("sampler_ess_prefix", _REAL, "sequences", "smallest ESS of the prefix weights of E at a position"),
        _field("sampler_pareto_k", _REAL, "1", "Pareto k of the whole-sequence weights of E; null for the policy"),
        _field("mean_weight", _REAL, "1", "mean weight of E; its expectation is 1 if log q is that of what drew E"),
        _field("mean_weight_z", _REAL, "1", "z of mean_weight - 1"),
        _field(
            "mean_score_z", _REAL, "1", "z of the mean score on E along v; its mean is 0 for correctly scored samples"
        ),
        _field("mean_surprisal_z", _REAL, "1", "z of the mean of surprisal - entropy on E; its mean is 0, too"),
        _field(
            "mean_logprob_difference", _REAL, "nats", "mean |log-probability under the policy - log q| of a token of E"
        ),
        _field("largest_logprob_difference", _REAL, "nats", "largest difference of this kind"),
        _field("excess_kurtosis", _REAL, "1", "excess kurtosis of the influence values of delta_h1"),
        _field("largest_influence", _REAL, "1", "largest share of one sequence in the variance of delta_h1 over E"),
        _field("truncated_fraction", _REAL, "1", "fraction of the responses of E that were cut at max_new_tokens"),
        _field("learning_rate", _REAL, "", "the checkpoint's nominal learning rate"),
        _field(
            "gradient_norm",
            _REAL,
            "",
            "norm, before clipping, of the gradient of the loss on U, cut and masked as by the trainer",
        ),
        _field("clip_factor", _REAL, "1", "factor that clipping applied to this gradient"),
        _field("update_norm", _REAL, "", "norm of v, the step per unit of learning rate"),
        _field("moved_fraction", _REAL, "1", "share of the trained weights that the step moves at all"),
        _field("mean_reward", _REAL, "", "mean reward on U, of all responses, those that were cut included"),
        _field("equal_reward_fraction", _REAL, "1", "fraction of prompts of U whose responses have equal rewards"),
    ]
)

_PER_STEP = "nats per learning-rate unit"

LINEARITY = pa.schema(
    [
        _field("normalization", _TEXT, "", "per_token or per_sequence"),
        _field("estimator", _TEXT, "", "estimator of delta_h"),
        _field("etas", _WHOLE, "step sizes", "number of step sizes in the fit of delta_h/eta against eta"),
        _field("derivative", _REAL, _PER_STEP, "derivative of the estimator at eta = 0, by forward mode"),
        _field("derivative_se", _REAL, _PER_STEP, "its standard error for this update"),
        _field("intercept", _REAL, _PER_STEP, "delta_h/eta as eta tends to 0"),
        _field("intercept_se", _REAL, _PER_STEP, "its standard error for this update"),
        _field(
            "difference",
            _REAL,
            _PER_STEP,
            "intercept minus derivative: orders that are missing from the fit",
        ),
        _field("difference_se", _REAL, _PER_STEP, "its standard error for this update; both share E"),
        _field("curvature", _REAL, "nats per squared unit", "coefficient of eta: half the second derivative"),
        _field("curvature_se", _REAL, "nats per squared unit", "its standard error for this update"),
    ]
)

ETA_PAIRS = pa.schema(
    [
        _field("normalization", _TEXT, "", "per_token or per_sequence"),
        _field("estimator", _TEXT, "", "estimator of delta_h"),
        _field("eta", _REAL, "learning-rate unit", "step size, measured at +eta and -eta"),
        _field("eta_over_lr", _REAL, "1", "eta divided by the checkpoint's learning rate"),
        _field("odd", _REAL, _H, "(delta_h(eta) - delta_h(-eta))/2: the first order, even orders cancelled"),
        _field("odd_se", _REAL, _H, "its standard error for this update"),
        _field("odd_remainder", _REAL, _H, "odd minus eta times the derivative: third order"),
        _field("odd_remainder_se", _REAL, _H, "its standard error for this update"),
        _field("even", _REAL, _H, "(delta_h(eta) + delta_h(-eta))/2: the second order, odd orders cancelled"),
        _field("even_se", _REAL, _H, "its standard error for this update"),
    ]
)

REPLICATES = pa.schema(
    [
        _field("normalization", _TEXT, "", "per_token or per_sequence"),
        _field("seed", _WHOLE, "", "seed of the E batch; the other tables use the first batch"),
        _field("delta_h1", _REAL, _H, "prediction at the learning rate from this E batch alone"),
        _field("se_given_u", _REAL, _H, "its standard error for this update"),
        _field("replicates", _WHOLE, "batches", "number of independent E batches"),
        _field("mean", _REAL, _H, "mean prediction over all E batches"),
        _field("mean_se", _REAL, _H, "its standard error for this update, from the spread of the predictions"),
        _field(
            "p_value",
            _REAL,
            "1",
            "p-value for this update: the predictions differ only by their standard errors (chi-squared)",
        ),
    ]
)

PREDICTORS = pa.schema(
    [
        _field("normalization", _TEXT, "", "per_token or per_sequence"),
        _field("eta", _REAL, "learning-rate unit", "step size"),
        _field("eta_over_lr", _REAL, "1", "eta divided by the checkpoint's learning rate"),
        _field(
            "predictor",
            _TEXT,
            "",
            "delta_h1 or delta_h12, which share E with delta_h; delta_h1_other_e: on further E; or from the literature",
        ),
        _field("predicted", _REAL, "", "eta times the predictor; those from the literature omit a constant factor"),
        _field("delta_h", _REAL, _H, "entropy change measured by the first estimator"),
    ]
)

_OF_CHECKPOINT = (
    _field("checkpoint", _TEXT, "", "name of the checkpoint directory"),
    _field("step", _WHOLE, "optimizer steps", "the trainer's global step"),
)


def of_checkpoints(schema: pa.Schema) -> pa.Schema:
    """Add the columns `checkpoint` and `step` to the schema of one checkpoint's table."""
    return pa.schema([*_OF_CHECKPOINT, *schema])


RESULTS = of_checkpoints(ESTIMATES)
TABLES = {"linearity": LINEARITY, "eta_pairs": ETA_PAIRS, "replicates": REPLICATES, "predictors": PREDICTORS}
"""The tables other than the estimates, by file name."""

AGREEMENT = of_checkpoints(
    pa.schema(
        [
            _field("quantity", _TEXT, "", "what is compared: the name of a column of results.parquet, or kl"),
            _field("trainer", _REAL, "", "what the trainer logged: a line through its values near this step; or null"),
            _field("probe", _REAL, "", "what the probe measures on U, or on U and E, in the same unit"),
            _field(
                "standard_error",
                _REAL,
                "",
                "of the difference: of the probe over prompts, and of the trainer over its own batches; null if exact",
            ),
            _field("z", _REAL, "1", "(probe - trainer) / standard_error"),
            _field(
                "verdict",
                _TEXT,
                "",
                "agrees, disagrees, not logged, or not comparable (batches or groups of another size, or one value)",
            ),
            _field(
                "explained_by",
                _TEXT,
                "",
                "known mistakes of a logged entropy that give the trainer's, nearest first; or null",
            ),
        ]
    )
)
"""What the trainer logged beside what the probe measures; one table for all checkpoints."""

_PER_REWARD = "nats per unit of reward"

INTERVENTIONS = of_checkpoints(
    pa.schema(
        [
            _field("normalization", _TEXT, "", "per_token or per_sequence"),
            _field("intervention", _TEXT, "", "what is changed; the null, which changes nothing on average: random"),
            _field("level", _TEXT, "", "screen: frozen denominators; predict: the exact step; measure: on E after it"),
            _field("delta_h1", _REAL, _H, "first-order change of the entropy by the step under the intervention"),
            _field("delta_h", _REAL, _H, "change measured after this step, by importance sampling on the same E"),
            _field("difference", _REAL, _H, "this change minus that of the run as it is, on the same E and U"),
            _field("low", _REAL, _H, "lower end of the interval of the difference for the mean update"),
            _field("high", _REAL, _H, "upper end of the interval of the difference for the mean update"),
            _field("se_over_e", _REAL, _H, "standard error of the difference for this update: over E"),
            _field("se_over_u", _REAL, _H, "standard error of the difference over U alone, for the mean update"),
            _field("se", _REAL, _H, "standard error of the difference for the mean update: over E and over U"),
            _field("degrees_of_freedom", _REAL, "1", "of the t interval and the p-value (Welch-Satterthwaite)"),
            _field("p_value", _REAL, "1", "p-value for the mean update: the intervention makes no difference (t test)"),
            _field("p_holm", _REAL, "1", "the same for the mean update, adjusted by Holm over the rows of this level"),
            _field("p_bh", _REAL, "1", "the same for the mean update, adjusted by Benjamini and Hochberg"),
            _field("verdict", _TEXT, "", "acts, does not act (within the margin), cannot tell; or as it is: the run"),
            _field("margin", _REAL, _H, "size of a difference up to which it does not matter"),
            _field("detectable", _REAL, _H, "smallest difference that E and U detect with probability 80 %"),
            _field("difference_half_0", _REAL, _H, "the difference by the half of E that the best are selected on"),
            _field("difference_half_1", _REAL, _H, "the difference by the other half of E, which judges the selected"),
            _field("p_half_1", _REAL, "1", "p-value for this update by the half of E that judges (t test)"),
            _field("kept_on_delta_h1", _REAL, _H, "delta_h1 once the momentum is that of the changed gradient"),
            _field("kept_on_difference", _REAL, _H, "the difference once both runs have saturated their momentum"),
            _field("delta_j", _REAL, "reward", "change of the expected reward, measured after this step; or null"),
            _field("difference_j", _REAL, "reward", "this change minus that of the run as it is, on the same E and U"),
            _field("difference_j_se", _REAL, "reward", "standard error of difference_j for this update: over E"),
            _field("difference_j_low", _REAL, "reward", "lower end of the interval of difference_j for this update"),
            _field("difference_j_high", _REAL, "reward", "upper end of the interval of difference_j for this update"),
            _field("price", _REAL, _PER_REWARD, "difference / difference_j: entropy kept per unit of reward gained"),
            _field("price_low", _REAL, _PER_REWARD, "lower end of Fieller's interval of the price for this update"),
            _field("price_high", _REAL, _PER_REWARD, "upper end of it for this update; null if difference_j may be 0"),
            _field("confidence_level", _REAL, "1", "confidence level of the intervals and of the verdict"),
        ]
    )
)
"""What each intervention changes; one table for all checkpoints."""


COMPARISON = pa.schema(
    [
        _field("run", _TEXT, "", "the run that the others are compared with, and its run directory if it has several"),
        _field("other_run", _TEXT, "", "the run that is compared with it, and its run directory"),
        _field("step", _WHOLE, "optimizer steps", "the trainer's global step, the same in both"),
        _field("checkpoint", _TEXT, "", "name of the checkpoint in `run`"),
        _field("other_checkpoint", _TEXT, "", "name of the checkpoint in `other_run`"),
        _field("normalization", _TEXT, "", "per_token or per_sequence"),
        _field("quantity", _TEXT, "", "H, delta_h1 or delta_h; the changes at the step size of the row"),
        _field("eta_over_lr", _REAL, "1", "step size as a multiple of the learning rate; null for H"),
        _field("value", _REAL, _H, "the quantity in `run`"),
        _field("value_se", _REAL, _H, "its standard error for this update: over E"),
        _field("other_value", _REAL, _H, "the quantity in `other_run`"),
        _field("other_value_se", _REAL, _H, "its standard error for this update: over E"),
        _field("difference", _REAL, _H, "other_value - value; null if one of them could not be measured"),
        _field("difference_se", _REAL, _H, "its standard error for this update: over E, paired as `shared_e` says"),
        *_ends("", "the difference"),
        _field("shared_e", _TEXT, "", "same batch or same prompts: paired by sequence; other prompts: independent"),
        _field("shared_u", _TEXT, "", "same step or same prompts: paired by prompt; other prompts: independent"),
        _field("confidence_level", _REAL, "1", "confidence level of the intervals"),
        _field(
            "verdict",
            _TEXT,
            "",
            "other_value is higher or lower for this update, or equal; cannot tell; not measured",
        ),
    ]
)
"""Two runs, checkpoint by checkpoint; the table that `entropy-probe compare` writes."""


def to_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Convert rows to a table with exactly this schema.

    Raises:
        ValueError: a row has a column too many or too few.
    """
    names = set(schema.names)
    for row in rows:
        if set(row) != names:
            raise ValueError(f"columns {sorted(set(row) ^ names)} are not in both the row and the schema")
    return pa.Table.from_pylist(list(rows), schema=schema)


def best_prediction(row: Row) -> str:
    """Return the name of a row's best prediction: `delta_h12` where the second order is resolved, else `delta_h1`."""
    return "delta_h12" if row["second_order"] == "resolved" else "delta_h1"


def interval_of(prediction: str, update: str) -> str:
    """Return how the columns of an interval begin: of `delta_h1` or `delta_h12`, for the update this, mean or next."""
    return f"{'delta_h12_' if prediction == 'delta_h12' else ''}{update}_update"


def unit_of(normalization: str) -> str:
    """Return the unit of entropies under a normalisation."""
    return "nats per token" if normalization == "per_token" else "nats per sequence"


def at_learning_rate(rows: Sequence[Row]) -> list[Row]:
    """Select the rows of each checkpoint at the non-zero step size closest to the learning rate."""
    chosen = []
    for group in by_checkpoint([row for row in rows if row["eta"] != 0]).values():
        closest = min((row["eta"] for row in group), key=lambda eta: abs(eta / group[0]["learning_rate"] - 1))
        chosen += [row for row in group if row["eta"] == closest]
    return chosen


def by_checkpoint(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by checkpoint name, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["checkpoint"], []).append(row)
    return groups


def by_run_directory(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by the run directory of their checkpoints, as far as the checkpoints' names tell it.

    Args:
        rows: with `checkpoint` and `step`.

    Returns:
        Rows by run directory, in order; all of them under "" where no training step is in two of these.
    """
    directory_of = {row["checkpoint"]: _run_directory(row["checkpoint"], row["step"]) for row in rows}
    steps = {(directory_of[row["checkpoint"]], row["step"]) for row in rows}
    if len(steps) == len({step for _, step in steps}):
        return {"": list(rows)}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(directory_of[row["checkpoint"]], []).append(row)
    return groups


def _run_directory(checkpoint: str, step: int) -> str:
    """What is before the last part of a name, without the step, which may be in it as in global_step_5/actor."""
    return re.sub(rf"(?<!\d){step}(?!\d)", "*", checkpoint).rpartition("/")[0]


def first_of_each(rows: Sequence[Row]) -> list[Row]:
    """Return the first row of each checkpoint."""
    return [group[0] for group in by_checkpoint(rows).values()]

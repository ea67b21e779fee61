"""Schemas of the tables of a run, with the unit and the meaning of every column in the field metadata."""

from collections.abc import Sequence

import pyarrow as pa

from entropy_core.estimates.estimate_columns import ESTIMATES
from entropy_core.estimates.fields import NATS, REAL, TEXT, WHOLE, ends, field
from entropy_core.estimates.selection import Row

_PER_STEP = "nats per learning-rate unit"

LINEARITY = pa.schema(
    [
        field("normalization", TEXT, "", "per_token or per_sequence"),
        field("estimator", TEXT, "", "estimator of delta_h"),
        field("etas", WHOLE, "step sizes", "number of step sizes in the fit of delta_h/eta against eta"),
        field("derivative", REAL, _PER_STEP, "derivative of the estimator at eta = 0, by forward mode"),
        field("derivative_se", REAL, _PER_STEP, "its standard error for this update"),
        field("intercept", REAL, _PER_STEP, "delta_h/eta as eta tends to 0"),
        field("intercept_se", REAL, _PER_STEP, "its standard error for this update"),
        field(
            "difference",
            REAL,
            _PER_STEP,
            "intercept minus derivative: orders that are missing from the fit",
        ),
        field("difference_se", REAL, _PER_STEP, "its standard error for this update; both share E"),
        field("curvature", REAL, "nats per squared unit", "coefficient of eta: half the second derivative"),
        field("curvature_se", REAL, "nats per squared unit", "its standard error for this update"),
    ]
)

ETA_PAIRS = pa.schema(
    [
        field("normalization", TEXT, "", "per_token or per_sequence"),
        field("estimator", TEXT, "", "estimator of delta_h"),
        field("eta", REAL, "learning-rate unit", "step size, measured at +eta and -eta"),
        field("eta_over_lr", REAL, "1", "eta divided by the checkpoint's learning rate"),
        field("odd", REAL, NATS, "(delta_h(eta) - delta_h(-eta))/2: the first order, even orders cancelled"),
        field("odd_se", REAL, NATS, "its standard error for this update"),
        field("odd_remainder", REAL, NATS, "odd minus eta times the derivative: third order"),
        field("odd_remainder_se", REAL, NATS, "its standard error for this update"),
        field("even", REAL, NATS, "(delta_h(eta) + delta_h(-eta))/2: the second order, odd orders cancelled"),
        field("even_se", REAL, NATS, "its standard error for this update"),
    ]
)

REPLICATES = pa.schema(
    [
        field("normalization", TEXT, "", "per_token or per_sequence"),
        field("seed", WHOLE, "", "seed of the E batch; the other tables use the first batch"),
        field("delta_h1", REAL, NATS, "prediction at the learning rate from this E batch alone"),
        field("se_given_u", REAL, NATS, "its standard error for this update"),
        field("replicates", WHOLE, "batches", "number of independent E batches"),
        field("mean", REAL, NATS, "mean prediction over all E batches"),
        field("mean_se", REAL, NATS, "its standard error for this update, from the spread of the predictions"),
        field(
            "p_value",
            REAL,
            "1",
            "p-value for this update: the predictions differ only by their standard errors (chi-squared)",
        ),
    ]
)

PREDICTORS = pa.schema(
    [
        field("normalization", TEXT, "", "per_token or per_sequence"),
        field("eta", REAL, "learning-rate unit", "step size"),
        field("eta_over_lr", REAL, "1", "eta divided by the checkpoint's learning rate"),
        field(
            "predictor",
            TEXT,
            "",
            "delta_h1 or delta_h12, which share E with delta_h; delta_h1_other_e: on further E; or from the literature",
        ),
        field("predicted", REAL, "", "eta times the predictor; those from the literature omit a constant factor"),
        field("delta_h", REAL, NATS, "entropy change measured by the first estimator"),
    ]
)

_OF_CHECKPOINT = (
    field("checkpoint", TEXT, "", "name of the checkpoint directory"),
    field("step", WHOLE, "optimizer steps", "the trainer's global step"),
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
            field("quantity", TEXT, "", "what is compared: the name of a column of results.parquet, or kl"),
            field("trainer", REAL, "", "what the trainer logged: a line through its values near this step; or null"),
            field("probe", REAL, "", "what the probe measures on U, or on U and E, in the same unit"),
            field(
                "standard_error",
                REAL,
                "",
                "of the difference: of the probe over prompts, and of the trainer over its own batches; null if exact",
            ),
            field("z", REAL, "1", "(probe - trainer) / standard_error"),
            field(
                "verdict",
                TEXT,
                "",
                "agrees, disagrees, not logged, or not comparable (batches or groups of another size, or one value)",
            ),
            field(
                "explained_by",
                TEXT,
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
            field("normalization", TEXT, "", "per_token or per_sequence"),
            field("intervention", TEXT, "", "what is changed; the null, which changes nothing on average: random"),
            field("level", TEXT, "", "screen: frozen denominators; predict: the exact step; measure: on E after it"),
            field("delta_h1", REAL, NATS, "first-order change of the entropy by the step under the intervention"),
            field("delta_h", REAL, NATS, "change measured after this step, by importance sampling on the same E"),
            field("difference", REAL, NATS, "this change minus that of the run as it is, on the same E and U"),
            field("low", REAL, NATS, "lower end of the interval of the difference for the mean update"),
            field("high", REAL, NATS, "upper end of the interval of the difference for the mean update"),
            field(
                "se_over_e", REAL, NATS, "standard error of the difference for this update: over E; null for a screen"
            ),
            field("se_over_u", REAL, NATS, "standard error of the difference over U alone, for the mean update"),
            field("se_interaction", REAL, NATS, "E x U interaction of the difference, in se_over_e, not in se_over_u"),
            field("se", REAL, NATS, "standard error of the difference for the mean update: over E and over U"),
            field("degrees_of_freedom", REAL, "1", "of the t interval and the p-value (Welch-Satterthwaite)"),
            field("p_value", REAL, "1", "p-value for the mean update: the intervention makes no difference (t test)"),
            field("p_holm", REAL, "1", "the same for the mean update, adjusted by Holm over the rows of this level"),
            field("p_bh", REAL, "1", "the same for the mean update, adjusted by Benjamini and Hochberg"),
            field("verdict", TEXT, "", "acts, does not act (within the margin), cannot tell; or as it is: the run"),
            field("margin", REAL, NATS, "size of a difference up to which it does not matter"),
            field("detectable", REAL, NATS, "smallest difference that E and U detect with probability 80 %"),
            field("difference_half_0", REAL, NATS, "the difference by the half of E that the best are selected on"),
            field("difference_half_1", REAL, NATS, "the difference by the other half of E, which judges the selected"),
            field("p_half_1", REAL, "1", "p-value for this update by the half of E that judges (t test)"),
            field("kept_on_delta_h1", REAL, NATS, "delta_h1 once the momentum is that of the changed gradient"),
            field("kept_on_difference", REAL, NATS, "the difference once both runs have saturated their momentum"),
            field(
                "delta_j",
                REAL,
                "reward",
                "change of the expected reward, measured after this step or predicted; or null",
            ),
            field("difference_j", REAL, "reward", "this change minus that of the run as it is, on the same E and U"),
            field("difference_j_se", REAL, "reward", "standard error of difference_j for this update: over E"),
            field("difference_j_low", REAL, "reward", "lower end of the interval of difference_j for this update"),
            field("difference_j_high", REAL, "reward", "upper end of the interval of difference_j for this update"),
            field("price", REAL, _PER_REWARD, "difference / difference_j: entropy kept per unit of reward gained"),
            field("price_low", REAL, _PER_REWARD, "lower end of Fieller's interval of the price for this update"),
            field("price_high", REAL, _PER_REWARD, "upper end of it for this update; null if difference_j may be 0"),
            field("confidence_level", REAL, "1", "confidence level of the intervals and of the verdict"),
        ]
    )
)
"""What each intervention changes; one table for all checkpoints."""


COMPARISON = pa.schema(
    [
        field("run", TEXT, "", "the run that the others are compared with, and its run directory if it has several"),
        field("other_run", TEXT, "", "the run that is compared with it, and its run directory"),
        field("step", WHOLE, "optimizer steps", "the trainer's global step, the same in both"),
        field("checkpoint", TEXT, "", "name of the checkpoint in `run`"),
        field("other_checkpoint", TEXT, "", "name of the checkpoint in `other_run`"),
        field("normalization", TEXT, "", "per_token or per_sequence"),
        field("quantity", TEXT, "", "H, delta_h1 or delta_h; the changes at the step size of the row"),
        field("eta_over_lr", REAL, "1", "step size as a multiple of the learning rate; null for H"),
        field("value", REAL, NATS, "the quantity in `run`"),
        field("value_se", REAL, NATS, "its standard error for this update: over E"),
        field("other_value", REAL, NATS, "the quantity in `other_run`"),
        field("other_value_se", REAL, NATS, "its standard error for this update: over E"),
        field("difference", REAL, NATS, "other_value - value; null if one of them could not be measured"),
        field("difference_se", REAL, NATS, "its standard error for this update: over E, paired as `shared_e` says"),
        *ends("", "the difference"),
        field("shared_e", TEXT, "", "same batch or same prompts: paired by sequence; other prompts: independent"),
        field("shared_u", TEXT, "", "same step or same prompts: paired by prompt; other prompts: independent"),
        field("confidence_level", REAL, "1", "confidence level of the intervals"),
        field(
            "verdict",
            TEXT,
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

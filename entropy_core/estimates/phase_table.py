"""The columns of phase.parquet and clipped.parquet: the optimizer steps on one rollout, and the tokens they clip."""

from typing import Literal

import pyarrow as pa

from entropy_core.estimates.fields import NATS, REAL, TEXT, WHOLE, field

Word = Literal["entropy falls", "entropy rises", "cannot tell", "weights-unreliable"]
"""The verdict of a row."""

_SHARE = "of the minibatch's tokens that count in the loss, the share"
_NATS_PER_TOKEN = "nats per token"
_REWARD = "reward"

PHASE = pa.schema(
    [
        field("normalization", TEXT, "", "per_token or per_sequence: of the entropy"),
        field("intervention", TEXT, "", "what is changed in the phase; as it is: nothing"),
        field("phase_step", WHOLE, "optimizer steps", "number of the step since the rollout, from 1"),
        field("epoch", WHOLE, "", "pass over the rollout that the step belongs to, from 1"),
        field("minibatch", WHOLE, "", "which part of the rollout the step is on, from 1"),
        field("learning_rate", REAL, "", "learning rate of the step"),
        field("estimator", TEXT, "", "estimator of delta_h and delta_j: the first of importance.estimators"),
        field("H", REAL, NATS, "entropy of the policy after the step, as measured"),
        field("delta_h", REAL, NATS, "change of H since the rollout, measured on E"),
        field("delta_h_se", REAL, NATS, "standard error of delta_h for this update: over E, and of rounding"),
        field("delta_h_low", REAL, NATS, "lower end of the interval of delta_h for this update"),
        field("delta_h_high", REAL, NATS, "upper end of the interval of delta_h for this update"),
        field("of_step", REAL, NATS, "change of H by this step alone: delta_h minus that of the row before, same E"),
        field("of_step_se", REAL, NATS, "standard error of of_step for this update: over E, and of rounding"),
        field("of_step_low", REAL, NATS, "lower end of the interval of of_step for this update"),
        field("of_step_high", REAL, NATS, "upper end of the interval of of_step for this update"),
        field("difference", REAL, NATS, "delta_h minus that of the run as it is after as many steps, on the same E"),
        field("difference_se", REAL, NATS, "standard error of difference for this update: over E, and of rounding"),
        field("difference_low", REAL, NATS, "lower end of the interval of difference for this update"),
        field("difference_high", REAL, NATS, "upper end of the interval of difference for this update"),
        field("delta_j", REAL, _REWARD, "change of the expected reward since the rollout; null without `price`"),
        field("delta_j_se", REAL, _REWARD, "standard error of delta_j for this update: over E"),
        field("delta_j_low", REAL, _REWARD, "lower end of the interval of delta_j for this update"),
        field("delta_j_high", REAL, _REWARD, "upper end of the interval of delta_j for this update"),
        field("ess", REAL, "sequences", "effective sample size of the weights of whole sequences of E"),
        field("ess_fraction", REAL, "1", "ess over the number of sequences"),
        field("pareto_k", REAL, "1", "Pareto k of these weights: how heavy their tail is; null without a tail to fit"),
        field("verdict", TEXT, "", "entropy falls, entropy rises, cannot tell, or weights-unreliable; by delta_h"),
        field("clip_low", REAL, "1", f"{_SHARE} clipped from below (A < 0); null: the loss clips none, or is your own"),
        field("clip_high", REAL, "1", f"{_SHARE} clipped from above (A > 0); null: see clip_low"),
        field("clip_dual", REAL, "1", f"{_SHARE} clipped by the dual clip (A < 0); null: see clip_low"),
        field("left_out", REAL, "1", "share of the responses of the minibatch that the off-policy mask leaves out"),
        field("largest_ratio", REAL, "1", "largest ratio of a token of the minibatch"),
        field(
            "approx_kl",
            REAL,
            _NATS_PER_TOKEN,
            "estimate of KL(old ‖ now) on the minibatch: mean of ratio - 1 - log ratio",
        ),
        field("reference_kl", REAL, _NATS_PER_TOKEN, "mean of the KL term on the minibatch; null without one"),
        field(
            "entropy_of_minibatch",
            REAL,
            _NATS_PER_TOKEN,
            "mean entropy of the tokens of the minibatch before the step",
        ),
        field("gradient_norm", REAL, "", "norm of the gradient before clipping"),
        field("clip_factor", REAL, "1", "factor that gradient clipping multiplied the gradient by; 1: not clipped"),
        field("step_norm", REAL, "per learning-rate unit", "norm of this step, over the nominal learning rate"),
        field("update_norm", REAL, "per learning-rate unit", "norm of all steps since the rollout together"),
        field("confidence_level", REAL, "1", "confidence level of every interval in this row"),
    ]
)
"""One row per normalisation, intervention (`as it is` included) and step."""

CLIPPED = pa.schema(
    [
        field("intervention", TEXT, "", "what is changed in the phase; as it is: nothing"),
        field("phase_step", WHOLE, "optimizer steps", "number of the step since the rollout, from 1"),
        field("sequence_id", WHOLE, "", "id of the response in U"),
        field("position", WHOLE, "tokens", "of the token in the response, from 0"),
        field("token", WHOLE, "", "id of the token"),
        field("text", TEXT, "", "its text"),
        field("side", TEXT, "", "low (A < 0), high (A > 0), or dual (A < 0): where its ratio is cut"),
        field("ratio", REAL, "1", "probability before the step over that at the rollout"),
        field("advantage", REAL, "", "advantage of the response"),
        field("old_logprob", REAL, "nats", "log-probability of the token at the rollout"),
        field("old_entropy", REAL, "nats", "entropy of the policy at the token, at the rollout"),
    ]
)
"""One row per intervention (`as it is` included), step, and token that the step clips."""

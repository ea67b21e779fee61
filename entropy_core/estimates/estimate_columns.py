"""The columns of results.parquet: prediction, measurement, their intervals, and what they rest on."""

import pyarrow as pa

from entropy_core.estimates.fields import NATS, REAL, TEXT, WHOLE, ends, field

ESTIMATES = pa.schema(
    [
        field("eta", REAL, "learning-rate unit", "absolute step size: the policy moves to theta + eta * v"),
        field("eta_over_lr", REAL, "1", "eta as a multiple of the checkpoint's learning rate, as asked for"),
        field("normalization", TEXT, "", "per_token: E[S]/E[T]; per_sequence: E[S]"),
        field(
            "estimator", TEXT, "", "estimator of delta_h: per_decision, weighted_per_decision, snis or path_integral"
        ),
        field("H", REAL, NATS, "entropy of the policy, responses cut at max_new_tokens; on E"),
        field("H_se", REAL, NATS, "standard error of H for this policy: over E"),
        field(
            "mean_length", REAL, "tokens", "mean response length on E, the EOS token counted, at most max_new_tokens"
        ),
        field("delta_h1", REAL, NATS, "predicted change of H, first order: eta times the derivative along v"),
        field("delta_h1_local", REAL, NATS, "part of delta_h1 at fixed prefixes; changed token choices give the rest"),
        field("se_given_u", REAL, NATS, "standard error of delta_h1 for this update: over E, with the step held fixed"),
        field(
            "se_given_u_jackknife", REAL, NATS, "the same for this update by jackknife, one sequence or prompt left out"
        ),
        field("se_over_u", REAL, NATS, "standard error of delta_h1 for the mean update: over U, with E held fixed"),
        field(
            "se_over_u_linearised", REAL, NATS, "the same for the mean update if the step were linear in the gradient"
        ),
        field("se_interaction", REAL, NATS, "E x U interaction for the mean update, in both se_given_u and se_over_u"),
        field(
            "nonlinearity_over_u", REAL, "1", "how far steps on halves of U are from averaging to the step; 0: linear"
        ),
        field("informative_prompts_u", WHOLE, "prompts", "prompts of U whose responses have unequal rewards"),
        field("interval_over_e", TEXT, "", "valid, or: no valid interval over E, and why; then none is given"),
        field("interval_over_u", TEXT, "", "valid, or: no valid interval over U, and why; then none is given"),
        *ends("", "delta_h1"),
        field(
            "delta_h2",
            REAL,
            NATS,
            "second order: eta^2/2 times the second derivative along v; its variation over U is unknown",
        ),
        field(
            "delta_h2_se",
            REAL,
            NATS,
            "standard error of delta_h2 for this update: over E, of rounding, and of orders above the second",
        ),
        field("delta_h2_this_update_low", REAL, NATS, "lower end of the interval of delta_h2 for this update"),
        field("delta_h2_this_update_high", REAL, NATS, "upper end of the interval of delta_h2 for this update"),
        field("delta_h2_points", WHOLE, "", "step sizes, or nodes of path_integral, that delta_h2 comes from"),
        field("second_order", TEXT, "", "resolved: the interval of delta_h2 is without 0; unresolved; or none: why"),
        field("delta_h12", REAL, NATS, "predicted change of H, second order: delta_h1 + delta_h2"),
        field(
            "delta_h12_se",
            REAL,
            NATS,
            "standard error of delta_h12 for this update: both parts share E; of rounding and higher orders, too",
        ),
        *ends("delta_h12_", "delta_h12"),
        field("delta_h12_interval_over_u", TEXT, "", "as interval_over_u, for the intervals of delta_h12 over U"),
        field("confidence_level", REAL, "1", "confidence level of every interval in this row"),
        field("delta_h", REAL, NATS, "measured change of H, by importance sampling on the same E"),
        field("delta_h_se", REAL, NATS, "standard error of delta_h for this update: over E, and of rounding"),
        *ends("delta_h_", "delta_h"),
        field("curvature", REAL, NATS, "delta_h minus eta times the derivative of the same estimator on the same E"),
        field("curvature_se", REAL, NATS, "its standard error for this update, and of rounding"),
        field("paired_difference", REAL, NATS, "delta_h - delta_h1; the curvature when the estimator is per_decision"),
        field("paired_difference_se", REAL, NATS, "its standard error for this update (both share E), and of rounding"),
        field("remainder", REAL, NATS, "delta_h - delta_h12: the orders above the second, if the weights are reliable"),
        field("remainder_se", REAL, NATS, "its standard error for this update (all share E), and of rounding"),
        field("ess", REAL, "sequences", "effective sample size of the whole-sequence weights"),
        field("ess_fraction", REAL, "1", "ess / n_sequences"),
        field("ess_prefix", REAL, "sequences", "smallest effective sample size of the prefix weights at a position"),
        field("pareto_k", REAL, "1", "Pareto k of the whole-sequence weights: how heavy their tail is"),
        field("pareto_k_threshold", REAL, "1", "largest k at which a mean of that many weights can be trusted"),
        field(
            "minimum_detectable",
            REAL,
            NATS,
            "smallest |delta_h| of this update that this E detects with probability 80 %",
        ),
        field(
            "noise_floor",
            REAL,
            NATS,
            "twice the rms of the delta_h that rounding alone produces; of path_integral, that its arithmetic does",
        ),
        field("p_this_update", REAL, "1", "p-value of delta_h = 0 for this update (t test)"),
        field("p_mean_update", REAL, "1", "p-value of delta_h = 0 for the mean update (t test)"),
        field("sign_this_update", TEXT, "", "sign of all of the interval of delta_h for this update, or unknown"),
        field("sign_mean_update", TEXT, "", "sign of all of the interval of delta_h for the mean update, or unknown"),
        field("sign_next_update", TEXT, "", "sign of all of the interval of delta_h for the next update, or unknown"),
        field("linearity", TEXT, "", "|curvature| below 5 % of |delta_h1|: linear; above: nonlinear; or undecided"),
        field("above_rounding", pa.bool_(), "", "whether |delta_h| is above noise_floor"),
        field("weights_reliable", pa.bool_(), "", "ESS/N of at least 1/2, and a light tail or nearly equal weights"),
        field(
            "verdict", TEXT, "", "reference, weights-unreliable, noise-limited, nonlinear or resolved, in this order"
        ),
        field("rule", TEXT, "", "the rule that gave the verdict"),
        field("n_sequences", WHOLE, "sequences", "size of E"),
        field("n_prompts_u", WHOLE, "prompts", "size of U"),
        field("inner_product", REAL, NATS, "<grad H, v> by the backward pass, times eta: should equal delta_h1"),
        field("delta_h1_momentum", REAL, NATS, "part of inner_product from the optimizer's first moment"),
        field("delta_h1_decay", REAL, NATS, "part of inner_product from weight decay; U's gradient gives the rest"),
        field("delta_h1_rounding", REAL, NATS, "part of inner_product from the rounding of weights kept in bfloat16"),
        field("attribution_closure", REAL, "1", "relative error of the sum of all parts against inner_product"),
        field("gradient_check", REAL, "1", "relative difference of <grad H, v> and forward mode, at equal baselines"),
        field("arithmetic", TEXT, "", "arithmetic of the derivatives over E: full, tf32 or bf16"),
        field(
            "derivative_check",
            REAL,
            "1",
            "rms error of the derivatives of E's tokens relative to forward mode in full; null if computed so",
        ),
        field("derivative_error", REAL, NATS, "what this error adds to delta_h1, on the first sequences of E"),
        field("derivative_error_se", REAL, NATS, "its standard error for this update: over these sequences"),
        field("unseen_share", REAL, "1", "expected steps of a response to a token that E never took where it was"),
        field("unseen_expected", REAL, "steps", "how many such steps a batch drawn like E should have"),
        field("unseen_bound", REAL, "1", "largest entropy that unseen responses can add, relative to that measured"),
        field("sampler", TEXT, "", "what drew E: the policy, or a proposal with weights to the policy"),
        field("sampler_ess_fraction", REAL, "1", "ESS/N of the whole-sequence weights from what drew E to the policy"),
        field("sampler_ess_prefix", REAL, "sequences", "smallest ESS of the prefix weights of E at a position"),
        field("sampler_pareto_k", REAL, "1", "Pareto k of the whole-sequence weights of E; null for the policy"),
        field("mean_weight", REAL, "1", "mean weight of E; its expectation is 1 if log q is that of what drew E"),
        field("mean_weight_z", REAL, "1", "z of mean_weight - 1"),
        field(
            "mean_score_z", REAL, "1", "z of the mean score on E along v; its mean is 0 for correctly scored samples"
        ),
        field("mean_surprisal_z", REAL, "1", "z of the mean of surprisal - entropy on E; its mean is 0, too"),
        field(
            "mean_logprob_difference", REAL, "nats", "mean |log-probability under the policy - log q| of a token of E"
        ),
        field("largest_logprob_difference", REAL, "nats", "largest difference of this kind"),
        field("excess_kurtosis", REAL, "1", "excess kurtosis of the influence values of delta_h1"),
        field("largest_influence", REAL, "1", "largest share of one sequence in the variance of delta_h1 over E"),
        field("truncated_fraction", REAL, "1", "fraction of the responses of E that were cut at max_new_tokens"),
        field("learning_rate", REAL, "", "the checkpoint's nominal learning rate"),
        field(
            "gradient_norm",
            REAL,
            "",
            "norm, before clipping, of the gradient of the loss on U, cut and masked as by the trainer",
        ),
        field("clip_factor", REAL, "1", "factor that clipping applied to this gradient"),
        field("update_norm", REAL, "", "norm of v, the step per unit of learning rate"),
        field("moved_fraction", REAL, "1", "share of the trained weights that the step moves at all"),
        field("mean_reward", REAL, "", "mean reward on U, of all responses, those that were cut included"),
        field("equal_reward_fraction", REAL, "1", "fraction of prompts of U whose responses have equal rewards"),
    ]
)

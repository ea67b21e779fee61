"""The first paragraph of a report, word by word, for each situation that a run can be in."""

from typing import Any

import pytest

from entropy_core.report.answer import answer


def row(checkpoint: str = "checkpoint-10", change: float = -0.02, **columns: Any) -> dict[str, Any]:
    """At the learning rate: H = 1, δH₁ = `change`, measured as predicted, and everything known to a tenth of it."""
    ends = {f"{prefix}{which}_update_{end}": change * (1 + sign * (0.1 if change > 0 else -0.1) * width)
            for prefix in ("", "delta_h12_") for which, width in (("this", 1), ("next", 4))
            for end, sign in (("low", -1), ("high", 1))}  # fmt: skip
    return {
        "checkpoint": checkpoint,
        "eta": 1e-3,
        "eta_over_lr": 1.0,
        "learning_rate": 1e-3,
        "H": 1.0,
        "delta_h1": change,
        "delta_h12": change,
        "delta_h": change,
        "second_order": "unresolved",
        **ends,
        "interval_over_u": "valid",
        "delta_h12_interval_over_u": "valid",
        "weights_reliable": True,
        "inner_product": change,
        "delta_h1_momentum": 0.25 * change,
        "delta_h1_decay": 0.0,
        "delta_h1_rounding": 0.0,
        "equal_reward_fraction": 0.1,
        "minimum_detectable": 0.004,
        "n_sequences": 256,
    } | columns


SOURCES = "75% of it comes from this batch's gradient, 25% of it comes from the momentum of earlier batches."
FALLING = "The entropy is falling: this step lowers it."
NEXT = "the next update of checkpoint-10, on another batch, should change it by"
HELD = "The measured change is within 0.1 % of the first-order prediction."
UNRESOLVED = {"this_update_low": -0.05, "this_update_high": 0.01}
FRESH = "no valid interval over U: the optimizer has made no step yet"
SITUATIONS = {
    "one checkpoint": (
        [row()],
        f"""{FALLING} It changes by 2 %; {NEXT} -2.8 % to -1.2 %. At checkpoint-10, {SOURCES} {HELD}""",
    ),
    "falling": (
        [row("checkpoint-5", -0.01), row("checkpoint-10", -0.03)],
        f"""The entropy is falling: at each of the 2 checkpoints a step lowers it. It changes by 1 % to 3 % per step,
        and by 3 % at the last; {NEXT} -4.2 % to -1.8 %. At checkpoint-10, {SOURCES} The 2 measured changes are within
        0.1 % of the first-order prediction.""",
    ),
    "rising": (
        [row(change=0.02, delta_h1_momentum=-0.01)],
        f"""The entropy is rising: this step raises it. It changes by 2 %; {NEXT} +1.2 % to +2.8 %. At checkpoint-10,
        150% of it comes from this batch's gradient, the momentum of earlier batches takes 50% back. {HELD}""",
    ),
    "flat": (
        [row(change=-1e-4)],
        "The entropy hardly moves: this step changes it by less than 0.1% of itself.",
    ),
    "unresolved": (
        [row(**UNRESOLVED)],
        """Whether the entropy falls or rises cannot be told from 256 sequences of E: for this step it is within [-0.05,
        +0.01]. This E tells changes from 0.004 nats up: take a larger one for less.""",
    ),
    "nonlinear": (
        [row(delta_h=-0.016, second_order="resolved", delta_h12=-0.0161)],
        f"""{FALLING} It changes by 1.6 %; {NEXT} -2.8 % to -1.2 %. At checkpoint-10, {SOURCES} The measured change is
        within 25 % of the first-order prediction, and within 0.62 % of the one with the curvature.""",
    ),
    "unreliable weights": (
        [row(weights_reliable=False, delta_h=None)],
        f"""{FALLING} It changes by 2 %; {NEXT} -2.8 % to -1.2 %. At checkpoint-10, {SOURCES} The change could not be
        measured at the learning rate: the importance weights are not reliable there. For checkpoint-10, measure at a
        smaller step size, or with a larger E.""",
    ),
    "first step": (
        [row(interval_over_u=FRESH, next_update_low=None, next_update_high=None, delta_h1_momentum=0.0)],
        f"""{FALLING} It changes by 2 %. At checkpoint-10, 100% of it comes from this batch's gradient. {HELD} What
        another batch would do is not said for checkpoint-10: the optimizer has made no step yet.""",
    ),
    "all rewards equal": (
        [row(equal_reward_fraction=1.0, delta_h1_momentum=-0.02)],
        f"""{FALLING} It changes by 2 %; {NEXT} -2.8 % to -1.2 %. At checkpoint-10, 100% of it comes from the momentum
        of earlier batches. {HELD} All responses to each prompt of U have equal rewards: the batch says nothing. Use
        other prompts.""",
    ),
    "wrong description of the run": (
        [row()],
        f"""These numbers may be of another run: read the warning above first. {FALLING} It changes by 2 %; {NEXT}
        -2.8 % to -1.2 %. At checkpoint-10, {SOURCES} {HELD}""",
    ),
    "both ways": (
        [row("a"), row("b", 0.02), row("c", 1e-5), row("d", **UNRESOLVED), row("checkpoint-10")],
        f"""In a step at the learning rate, the entropy falls at a, checkpoint-10, rises at b, hardly moves at c. At d
        the sign cannot be told. It changes by 2 %; {NEXT} -2.8 % to -1.2 %. At checkpoint-10, {SOURCES} The 3 measured
        changes are within 0.1 % of the first-order prediction. This E tells changes from 0.004 nats up: take a larger
        one for less.""",
    ),
}


UNLIKE_THE_RUN = ("wrong description of the run",)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_answer(situation):
    rows, said = SITUATIONS[situation]
    assert answer(rows, situation in UNLIKE_THE_RUN) == " ".join(said.split())


def test_a_sweep_without_a_step_says_nothing_of_one():
    at_zero = row(eta=0.0, eta_over_lr=0.0, delta_h1=0.0)
    assert answer([at_zero]) == "No step size but 0 was asked for, so nothing is said of a step."

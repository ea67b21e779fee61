"""The steps on one rollout, as TRL takes them."""

from pathlib import Path

import pytest
from phase_of_trainer import CASES, ROLLOUTS, followed, prepare, worst_and_moved
from proofs import Proof, power

pytestmark = pytest.mark.validate

ERROR = 1e-6


def test_the_phase_is_the_trainers(record: Proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts, accumulated, epochs = ROLLOUTS["whole"]
    record(
        "The steps on one rollout",
        claim=f"TRL trains a tiny policy with steps_per_generation = {parts} and num_iterations = {epochs}, its "
        "generator seeded where it shuffles the rollout. The probe is given the checkpoint before the second rollout, "
        "the responses of that rollout and the seed, and follows the phase: the weights after its last step. Along a "
        "schedule, the learning rate rises and then falls within the phase.",
        limit=f"largest error of a weight below {power(ERROR)}, with more than 5 % of the tokens of a step clipped",
        columns=("setting", "largest error of a weight", "largest change of a weight", "clipped low", "clipped high"),
    )
    prepare(monkeypatch)
    missed = []
    for number, (case, settings) in enumerate(CASES.items()):
        home = tmp_path / str(number)
        home.mkdir()
        steps, lr, count = followed(home, settings, parts, accumulated, epochs)
        worst, moved = worst_and_moved(home, steps, lr, count)
        low, high = (max(step.summary[f"clip_{side}"] for step in steps) for side in ("low", "high"))
        record.row(case, power(worst), power(moved), f"{low:.0%}", f"{high:.0%}")
        if not (worst < ERROR < 1e-3 < moved and min(low, high) > 0.05):
            missed.append(case)
    assert not missed, missed

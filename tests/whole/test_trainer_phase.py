"""The weights after the steps that TRL takes on one rollout are those that the probe follows."""

from pathlib import Path

import pytest
from phase_of_trainer import CASES, ROLLOUTS, followed, prepare, worst_and_moved
from trainer_fixtures import G


@pytest.mark.parametrize("case", CASES)
def test_the_weights_after_the_phase_are_those_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
):
    """On a rollout of two minibatches, each of two accumulated parts; that of 8 parts is in tests/validation."""
    prepare(monkeypatch)
    steps, lr, count = followed(tmp_path, CASES[case], *ROLLOUTS["small"])
    assert len(steps) == count and G == 4
    worst, moved = worst_and_moved(tmp_path, steps, lr, count)
    assert worst < 1e-6 < 1e-3 < moved
    rates = [step.summary["rate"] for step in steps]
    assert rates[0] == 1 and (max(rates) > 1.1 and rates[-1] < 0.9 if "schedule" in case else set(rates) == {1.0})
    assert max(s.summary["clip_low"] for s in steps) > 0.05 and max(s.summary["clip_high"] for s in steps) > 0.05
    if "masked" in case:
        assert max(step.summary["left_out"] for step in steps) > 0
    if "delta" in CASES[case]:
        assert max(step.summary["clip_dual"] for step in steps) > 0

"""What TRL's trainer logs as entropy, with each known mistake planted in it: the probe names it from cached columns."""

import copy
from pathlib import Path

import pytest
from planted_entropies import MISTAKES, RIGHT, policy, seen_by_the_probe, train
from proofs import Proof

pytestmark = pytest.mark.validate


def test_a_planted_mistake_is_named_and_a_right_log_is_not_accused(record: Proof, tmp_path: Path):
    record(
        "Mistakes of a logged entropy",
        claim="TRL's GRPOTrainer trains a tiny policy for ten steps, and a subclass logs another entropy. The probe is "
        "given the run, and names the mistake from cached columns alone; where several mistakes give the same number, "
        "all of them.",
        limit="the planted mistake is among those named, and nothing is named where there is none",
        columns=("planted", "logged", "H of the probe", "z", "named"),
    )
    base, missed = policy(), []
    for number, (what, planted) in enumerate((RIGHT | MISTAKES).items()):
        home = tmp_path / str(number)
        home.mkdir()
        train(copy.deepcopy(base), home / "run", planted.mistake, **planted.settings)
        rows = seen_by_the_probe(home, [name for name in planted.settings if name == "top_p"])
        entropies = [row for row in rows if row["quantity"] == "entropy"]
        worst = max(entropies, key=lambda row: abs(row["z"]))
        named = next((row["explained_by"] for row in entropies if row["explained_by"]), "")
        record.row(what, f"{worst['trainer']:.4f}", f"{worst['probe']:.4f}", f"{worst['z']:+.1f}", named or "–")
        others = {row["quantity"] for row in rows if row["verdict"] == "disagrees"} - {"entropy"}
        right = (
            planted.name in named.split(", or ")
            if planted.name
            else {row["verdict"] for row in entropies} == {"agrees"}
        )
        missed += [] if right and not others else [what]
    record.note(
        "The mean of −log π of the samples is the entropy on average: at the temperature of the policy no log shows it."
    )
    assert missed == []

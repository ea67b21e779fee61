"""A real trainer that counts padding into the entropy that it logs is named; `make validate` plants the others."""

from planted_entropies import MISTAKES, policy, seen_by_the_probe, train

from entropy_core.report.agreement import disagreements


def test_a_trainer_that_counts_padding_is_named(tmp_path):
    planted = MISTAKES["padding counted"]
    train(policy(), tmp_path / "run", planted.mistake, **planted.settings)
    rows = seen_by_the_probe(tmp_path, sequences=256)
    assert {row["quantity"] for row in rows if row["verdict"] == "disagrees"} == {"entropy"}
    (sentence,) = disagreements(rows)
    assert f"What the trainer calls entropy is as large as {planted.name}" in sentence

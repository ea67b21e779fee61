"""The committed table of the benchmarks: it is what its numbers say, and a missed mark has its reason."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import model_shape, passes
from benchmarks.__main__ import GROUPS, main, page, setting
from benchmarks.common import Row, median_ratio, take_turns
from benchmarks.reasons import by_profile, by_stage
from entropy_core.policy import moves

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FOUND = json.loads((DOCS / "benchmarks.json").read_text(encoding="utf-8"))


def test_the_page_is_made_of_the_numbers():
    assert (DOCS / "benchmarks.md").read_text(encoding="utf-8") == page(FOUND)


def test_every_group_was_measured():
    assert list(FOUND) == list(GROUPS)


@pytest.mark.parametrize("row", [row for group in FOUND.values() for row in group["rows"]], ids=lambda row: row["name"])
def test_a_mark_is_held_to_and_what_misses_it_says_why(row):
    measured = Row(*(row[name] for name in ("name", "ours", "against", "ratio", "mark")))
    assert measured.holds == row["holds"]
    assert row["holds"] is not False or len(row["reason"]) > 40, "a mark is missed without a reason"


@pytest.mark.parametrize(
    ("ratio", "mark", "holds"),
    [(1.1, "≤ 1.15", True), (1.2, "≤ 1.15", False), (1.6, "≥ 1.5", True), (1.4, "≥ 1.5", False), (9.0, "", None)],
)
def test_a_mark_is_a_bound(ratio: float, mark: str, holds: bool | None):
    assert Row("x", "1 s", "1 s", ratio, mark).holds is holds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_of_a_pass_runs_in_the_dtypes_of_a_gpu(monkeypatch: pytest.MonkeyPatch, dtype: str):
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    for shape in ("SMOLLM2_135M", "QWEN25_05B"):
        monkeypatch.setattr(model_shape, shape, tiny | {"vocab_size": 64})
    monkeypatch.setattr(model_shape, "VOCABULARY", 64)
    monkeypatch.setattr(model_shape, "INSTALLED", Path("nowhere"))
    policy = model_shape.make_policy(dtype)
    assert str(policy.dtype) == f"torch.{dtype}" and policy.scorer.head_is_known
    processor, batch = model_shape.make_processor(policy, 2), model_shape.make_sequences([5, 3, 4])
    v = passes.random_direction(policy)
    for way in (passes.bare_forward, passes.full_logits):
        way(processor, batch)
    for way in passes.ways_of_derivatives(processor, batch, v).values():
        way()
    before, _ = processor.score(batch)
    with moves.moved(policy, v, 0.5):
        assert not processor.score(batch)[0].logprobs_K.equal(before.logprobs_K)


def test_marks_are_those_of_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(passes, "DTYPES", ("float32", "bfloat16"))
    rows = list(passes.in_each_dtype(lambda dtype: iter([Row("pass", dtype, "1 s", 1.1, "≤ 1.15")])))
    assert [(row.name, row.ours, row.mark) for row in rows] == [
        ("pass", "float32", "≤ 1.15"),
        ("pass, bfloat16", "bfloat16", ""),
    ]


def test_runs_take_turns():
    order: list[str] = []
    taken = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "a", "b", "a", "b"] and {len(times) for times in taken.values()} == {2}
    assert median_ratio([2.0, 9.0, 3.0], [1.0, 3.0, 3.0]) == 2.0


def test_the_command_writes_both_files_and_keeps_other_groups_with_what_they_were_measured_on(tmp_path, monkeypatch):
    elsewhere = {name: group | {"setting": {"device": "another"}} for name, group in FOUND.items()}
    (tmp_path / "benchmarks.json").write_text(json.dumps(elsewhere), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "padding", "--out", str(tmp_path)])
    main()
    found = json.loads((tmp_path / "benchmarks.json").read_text(encoding="utf-8"))
    assert list(found) == list(GROUPS) and found["padding"]["setting"] == setting()
    assert {name: group for name, group in found.items() if name != "padding"} == {
        name: group for name, group in elsewhere.items() if name != "padding"
    }
    (padding,) = found["padding"]["rows"]
    assert padding["holds"] is True and 0 < padding["ratio"] < 0.05
    assert (tmp_path / "benchmarks.md").read_text(encoding="utf-8") == page(found)


@pytest.mark.parametrize(("ratio", "reason"), [(3.5, "two products of three"), (3.1, "")])
def test_a_reason_is_looked_for_where_a_mark_is_missed(ratio: float, reason: str):
    asked = []

    def why() -> str:
        asked.append(ratio)
        return "two products of three"

    row = Row("x", "1 s", "1 s", ratio, "≤ 3.2").because(why)
    assert Row("x", "1 s", "1 s", ratio).because(why).reason == ""
    assert (row.reason, row.ratio, len(asked)) == (reason, ratio, 1 if reason else 0)
    rows = [{**vars(row), "holds": row.holds}]
    text = page({"passes": {"date": "2026-01-01", "setting": {"device": "one"}, "rows": rows}})
    assert ("- x: two products of three" in text) is bool(reason)


def test_a_profile_tells_products_from_all_else():
    x = torch.randn(256, 256)

    def products() -> None:
        for _ in range(20):
            torch.nn.functional.linear(x, x).addmm_(x, x)

    found = by_profile(products, lambda: x.exp().sum(), "256 rows")
    here, there = re.search(r"matrix products (\S+) here and (\S+) there", found).groups()
    assert float(here) > float(there) == 0 and "of 256 rows" in found


def test_stages_are_compared_by_what_their_manifests_say():
    found = by_stage({"score": 3.0, "report": 1.0}, {"score": 1.5, "report": 1.0})
    assert "4 here and 2.5 there (1.6 times)" in found
    assert "score 3 here and 1.5 there (2 times), report" in found


def test_an_unknown_group_is_refused(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "everything", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^2$"):
        main()
    assert "no group everything" in capsys.readouterr().err and not list(tmp_path.iterdir())

"""Recorded runs: opened from Python, and side by side, where differences are paired on the E and U that runs share."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pyarrow.parquet as pq
import pytest
from compared_fixtures import Compared
from notebooks import cells, execute
from pipeline_fixtures import NAMES, Counting, skip_figures

import entropy_core as probe
from entropy_core.config.schema import VarianceRequest
from entropy_core.errors import StoreError
from entropy_core.estimates.distributions import t_quantile
from entropy_core.estimates.selection import by_run_directory
from entropy_core.estimates.tables import COMPARISON
from entropy_core.execution import Execution
from entropy_core.pipeline import statistics
from entropy_core.pipeline.comparison import compare
from entropy_core.pipeline.recorded import read_run
from entropy_core.report import comparison as page
from entropy_core.report import figures
from entropy_core.store import runs
from entropy_core.store.artifact import Artifact
from entropy_core.store.data_files import VECTORS
from entropy_core.store.store import Store
from flows.cli import main

pytest_plugins = ["compared_fixtures"]
Row = dict[str, Any]
NOTEBOOK = Path(__file__).parents[2] / "docs" / "from-python.ipynb"


@pytest.fixture(scope="module")
def rows(compared: Compared, tmp_path_factory) -> list[Row]:
    """The first with a rerun, with another training run, and with itself on other batches."""
    folder = tmp_path_factory.mktemp("three")
    others = (compared.ridge, compared.second, compared.other_batches)
    found = compare(compared.store, [compared.first.run_id, *(one.run_id for one in others)], folder)
    assert pq.read_table(folder / "compare.parquet").to_pylist() == found.rows
    return found.rows


def of(rows: list[Row], other: Any, quantity: str, normalization: str = "per_token") -> list[Row]:
    wanted = (other.run_id, quantity, normalization)
    return [row for row in rows if (row["other_run"], row["quantity"], row["normalization"]) == wanted]


def scores(compared: Compared, run: Any) -> list[list[Artifact]]:
    """The shards of E of each checkpoint."""
    return [entry["inputs"]["scores"] for entry in read_run(compared.store, run.run_id)[2]]


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["per_token", "per_sequence"])
@pytest.mark.parametrize("which", ["ridge", "second", "other_batches"])
def test_both_values_and_their_errors_are_those_of_the_results(compared, rows, which, normalization):
    other = getattr(compared, which)
    columns = {"H": ("H", "H_se"), "delta_h1": ("delta_h1", "se_given_u"), "delta_h": ("delta_h", None)}
    for quantity, (value, error) in columns.items():
        found = of(rows, other, quantity, normalization)
        assert [row["checkpoint"] for row in found] == [row["other_checkpoint"] for row in found] == list(NAMES)
        for prefix, run in (("", compared.first), ("other_", other)):
            at_lr = [
                row
                for row in run.report.table("results.parquet").to_pylist()
                if (row["eta_over_lr"], row["estimator"], row["normalization"]) == (1, "per_decision", normalization)
            ]
            for row, result in zip(found, at_lr, strict=True):
                assert row[f"{prefix}value"] == pytest.approx(result[value], rel=1e-12)
                if error:
                    assert row[f"{prefix}value_se"] == pytest.approx(result[error], rel=1e-12)
                else:  # without rounding, which is an error of a difference once
                    total = math.hypot(row[f"{prefix}value_se"], result["noise_floor"] / 2)
                    assert total == pytest.approx(result["delta_h_se"], rel=1e-12)
                assert row["difference"] == pytest.approx(row["other_value"] - row["value"], rel=1e-9, abs=1e-15)


def test_sequences_that_answer_the_same_prompts_are_paired(compared, rows):
    """H per sequence is the mean of the sequences' entropies, so the paired error is that of a mean of differences."""
    found = of(rows, compared.second, "H", "per_sequence")
    for row, *both in zip(found, scores(compared, compared.first), scores(compared, compared.second), strict=True):
        one, another = (
            [entropy for shard in shards for entropy in shard.table("scores.parquet")["sum_entropy"].to_pylist()]
            for shards in both
        )
        differences = [b - a for a, b in zip(one, another, strict=True)]
        assert row["shared_e"] == row["shared_u"] == "same prompts"
        assert row["difference"] == pytest.approx(mean(differences), rel=1e-6)
        error = stdev(differences) / len(differences) ** 0.5
        assert row["difference_se"] == pytest.approx(error, rel=1e-6)
        reach = t_quantile(0.975, len(differences) - 1) * error
        assert row["this_update_low"] == pytest.approx(row["difference"] - reach, rel=1e-5)
        assert row["this_update_high"] == pytest.approx(row["difference"] + reach, rel=1e-5)
        assert row["mean_update_low"] is None  # of H, whose error over U there is none of


def test_the_errors_of_other_prompts_are_independent(compared, rows):
    for quantity in ("H", "delta_h1"):
        for row in of(rows, compared.other_batches, quantity):
            assert row["shared_e"] == row["shared_u"] == "other prompts"
            assert row["difference_se"] == pytest.approx(math.hypot(row["value_se"], row["other_value_se"]), rel=1e-12)


def test_a_rerun_is_paired_on_all_of_e_and_shares_the_step(compared, rows):
    for row in of(rows, compared.ridge, "H"):
        assert (row["shared_e"], row["shared_u"]) == ("same batch", "same step")
        assert (row["difference"], row["difference_se"], row["verdict"]) == (0, 0, "equal")
    for row in of(rows, compared.ridge, "delta_h1"):
        assert row["difference"] != 0
        assert 0 < row["difference_se"] < 0.5 * math.hypot(row["value_se"], row["other_value_se"])
        for update in ("mean", "next"):  # the prompts of U have the same part in both, which cancels
            for end in ("low", "high"):
                assert row[f"{update}_update_{end}"] == pytest.approx(row[f"this_update_{end}"], rel=1e-9)


def test_prompts_of_u_are_paired_or_add(compared, rows):
    """For steps that are other ones the intervals over U are wider than those of this update."""
    for other in (compared.second, compared.other_batches):
        for row in of(rows, other, "delta_h1"):
            widths = [row[f"{name}_update_high"] - row[f"{name}_update_low"] for name in ("this", "mean", "next")]
            assert widths[0] < widths[1] < widths[2]
    [apart, *_] = of(rows, compared.other_batches, "delta_h1")
    results = [
        next(row for row in run.report.table("results.parquet").to_pylist() if row["eta_over_lr"] == 1)
        for run in (compared.first, compared.other_batches)
    ]
    over_u = [row["se_over_u"] ** 2 - row["se_interaction"] ** 2 for row in results]
    variance = apart["difference_se"] ** 2 + sum(over_u)
    half = (apart["mean_update_high"] - apart["mean_update_low"]) / 2
    assert t_quantile(0.975, 100) < half / variance**0.5 < t_quantile(0.975, 6)


def test_the_order_of_the_runs_is_the_sign(compared, rows, tmp_path):
    turned = compare(compared.store, [compared.second.run_id, compared.first.run_id], tmp_path).rows
    for row, back in zip([row for row in rows if row["other_run"] == compared.second.run_id], turned, strict=True):
        assert back["difference"] == -row["difference"]
        assert back["difference_se"] == pytest.approx(row["difference_se"], rel=1e-12)
        assert {row["verdict"], back["verdict"]} in ({"higher", "lower"}, {"cannot tell"})


def test_the_run_directories_of_one_sweep_are_compared(compared, tmp_path):
    found = compare(compared.store, [compared.both.run_id], tmp_path).rows
    assert {(row["run"], row["other_run"]) for row in found} == {("faster", "run")}
    apart = compare(compared.store, [compared.second.run_id, compared.first.run_id], tmp_path).rows
    names = ("run", "other_run", "checkpoint", "other_checkpoint")
    for one, other in zip(found, apart, strict=True):
        assert {**one, **dict.fromkeys(names)} == {**other, **dict.fromkeys(names)}
    assert {row["checkpoint"] for row in found} == {f"faster/{name}" for name in NAMES}


@pytest.mark.parametrize(
    ("steps", "directories"),
    [
        ({"a/checkpoint-3": 3, "b/checkpoint-3": 3, "b/final": 5}, {"a": 1, "b": 2}),
        ({"a/global_step_5/actor": 5, "b/global_step_5/actor": 5}, {"a/global_step_*": 1, "b/global_step_*": 1}),
        ({"global_step_5/actor": 5, "global_step_15/actor": 15}, {"": 2}),  # one run, whose checkpoints have long names
        ({"a/checkpoint-3": 3, "b/checkpoint-4": 4}, {"": 2}),  # one curve, as of a run that went on elsewhere
        ({"checkpoint-3": 3}, {"": 1}),
    ],
)
def test_run_directories_are_told_apart_where_a_step_is_in_two(steps, directories):
    rows = [{"checkpoint": name, "step": step} for name, step in steps.items()]
    assert {name: len(group) for name, group in by_run_directory(rows).items()} == directories


def test_the_report_of_several_run_directories_has_a_curve_for_each(compared, tmp_path, monkeypatch):
    store = Store(shutil.copytree(compared.store.root, tmp_path / "artifacts"))
    drawn: dict[str, Any] = {}
    skip_figures(monkeypatch)
    monkeypatch.setattr(
        figures, "save_figure", lambda drawing, png, svg: (drawn.update({png.stem: drawing}), svg.touch())
    )
    request = VarianceRequest(run=compared.both.run_id, artifacts=str(store.root), confidence_level=0.9)
    statistics.variance(request, store, Counting(store, Execution()))
    [legend] = drawn["training"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["faster", "run"]
    above, below = drawn["training"].axes
    assert [list(line.lines[0].get_xdata()) for axes in (above, below) for line in axes.containers] == [[3, 5]] * 4


# --- what is read ----------------------------------------------------------------------------------------------------


def test_no_stage_runs_and_no_vector_is_read(compared, tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a stage was run, or a vector was read")

    opened: list[str] = []
    locate = Artifact.path
    monkeypatch.setattr(Artifact, "path", lambda self, name: (opened.append(name), locate(self, name))[1])
    monkeypatch.setattr(Artifact, "vector", refuse)
    monkeypatch.setattr(Store, "run", refuse)
    compare(compared.store, [compared.first.run_id, compared.second.run_id], tmp_path)
    assert "tokens.safetensors" in opened and not [name for name in opened if name.startswith(VECTORS)]


# --- what is said ----------------------------------------------------------------------------------------------------


def command(compared: Compared, *arguments: Any) -> int:
    return main(["compare", *map(str, arguments), "--artifacts", str(compared.store.root)])


def test_the_command_says_it_and_writes_a_folder(compared, tmp_path, capsys):
    named = [compared.first.run_id, compared.ridge.run_id]
    assert command(compared, *named, "-o", tmp_path / "new" / "folder") == 0
    folder = tmp_path / "new" / "folder"
    printed = capsys.readouterr().out
    said = " ".join(printed.split())
    assert (
        f"{named[1]} estimates from the same E and the same step as {named[0]}; what differs is baseline ridge." in said
    )
    assert f"{folder}/" in said and all(path.name in said for path in folder.iterdir())
    kinds = ("html", "md", "parquet", "png", "svg")
    assert {path.name for path in folder.iterdir()} == {f"compare.{kind}" for kind in kinds}
    text = (folder / "compare.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {named[0]} compared with {named[1]}\n\n{named[1]} estimates from the same E")
    assert f"\n| setting | `{named[0]}` | `{named[1]}` |" in text
    assert "\n| `variance.baseline` | `time_loo` | `ridge` |" in text
    assert f"\n| rerun_of | – | `{named[0]}` |" in text and f"\n| run | `{named[0]}` | `{named[1]}` |" in text
    metadata = pq.read_schema(folder / "compare.parquet").metadata
    assert metadata[b"runs"].decode().split() == named and metadata[b"code"].startswith(b"entropy-probe ")
    assert pq.read_schema(folder / "compare.parquet").names == COMPARISON.names


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["first"], "there is nothing to compare .* with.*one run was given.*entropy-probe runs"),
        (["first", "first"], "there is nothing to compare"),
        (["first", "no-such-run"], "there is no run 'no-such-run'.*recorded are"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(compared, tmp_path, capsys, asked, said):
    named = [getattr(compared, run).run_id if hasattr(compared, run) else run for run in asked]
    assert command(compared, *named, "-o", tmp_path / "folder") == 2
    printed = capsys.readouterr()
    assert re.search(said, printed.err) and printed.out == "" and not (tmp_path / "folder").exists()


def row(step: int, quantity: str, value: float, other: float, se: float, **changes: Any) -> Row:
    difference = other - value
    low, high = difference - 2 * se, difference + 2 * se
    verdict = "equal" if difference == se == 0 else "higher" if low > 0 else "lower" if high < 0 else "cannot tell"
    return dict.fromkeys(COMPARISON.names) | {
        **{"run": "a", "other_run": "b", "step": step, "quantity": quantity, "normalization": "per_token"},
        **{"value": value, "value_se": 0.02, "other_value": other, "other_value_se": 0.01, "verdict": verdict},
        **{"difference": difference, "difference_se": se, "this_update_low": low, "this_update_high": high},
        **{"shared_e": "same batch", "shared_u": "same step", "confidence_level": 0.999},
        **changes,
    }


def test_the_paragraph_of_a_rerun():
    changes = {"a": [], "b": ["baseline ridge"]}
    rows = [row(step, "delta_h1", -1.0, -1.01, se) for step, se in ((3, 0.001), (5, 0.1))]
    [said] = page.answers(rows, changes)
    assert said == (
        "b estimates from the same E and the same step as a; what differs is baseline ridge. Over 2 checkpoints, δH₁ "
        "differs by up to 1 %, and it differs by more than chance at 1 of them; its standard error over E is 0.50 times"
        " that of the first. E is the same batch in both, so that the errors of a difference are paired sequence by "
        "sequence; both take the same step on the same U."
    )
    [said] = page.answers([row(3, "delta_h1", -1.0, -1.0, 0.0)], {"a": [], "b": ["confidence_level 0.999"]})
    assert "what differs is confidence_level 0.999. No estimate differs. E is" in said


def test_the_paragraph_of_another_training_run():
    shares = {"shared_e": "same prompts", "shared_u": "other prompts"}
    rows = [row(3, "delta_h1", -1.0, -1.2, 0.5, **shares), row(3, "H", 2.0, 1.5, 0.01, **shares)]
    [said] = page.answers(rows, {"a": [], "b": ["loss dr_grpo"]})
    assert said == (
        "At step 3, the last that both have, the next step of b changes the entropy by -1.2 nats per token, and that of"
        " a by -1 (δH₁): a difference of -0.2 [-1.2, +0.8], which may be chance. The entropy of b is then 1.5, and that"
        " of a 2: a difference of -0.5 [-0.52, -0.48], which is more than chance. Besides the checkpoints, the settings"
        " differ: loss dr_grpo. The sequences of E answer the same prompts in both, so that the errors of a difference "
        "are paired sequence by sequence; U has other prompts in each, and its errors are independent, too."
    )


def test_without_a_common_step_the_figure_compares_alone():
    assert page.answers([], {"a": [], "b": []}) == [
        "b has no checkpoint of a step that a has, so that the figure alone compares them."
    ]
    text = page.markdown([], {"a": [], "b": []}, {}, [{"run": "a"}, {"run": "b"}])
    assert "compare.png" in text and "Checkpoint by checkpoint" not in text


def test_a_level_is_said_with_its_digits():
    text = page.markdown(
        [row(3, "delta_h1", -1.0, -1.2, 0.5), row(3, "H", 2.0, 1.5, 0.01)], {"a": [], "b": []}, {}, [{}]
    )
    assert "intervals at 99.9 % for one difference" in text


# --- from Python ------------------------------------------------------------------------------------------------------


def test_the_import_loads_nothing_and_a_run_neither_torch_nor_prefect(compared: Compared):
    script = f"""
import sys
def heavy():
    print(*sorted({{name.partition(".")[0] for name in sys.modules}} & {{"torch", "prefect", "pyarrow", "flows"}}))
import entropy_core as probe
heavy()
run = probe.load_run("latest", store={str(compared.store.root)!r})
repr(run), run.tokens()
heavy()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "pyarrow"]
    with pytest.raises(AttributeError, match="no attribute 'load_runs'"):
        probe.load_runs  # noqa: B018 (it is looked up)


def test_the_latest_is_a_sweep_and_any_other_is_named(compared: Compared):
    assert probe.load_run("latest", compared.store.root).id == compared.second.run_id
    rerun = probe.load_run(compared.ridge.run_id, str(compared.store.root))
    assert (rerun.rerun_of, rerun.config["variance"]["baseline"]) == (compared.first.run_id, "ridge")
    assert rerun.checkpoints == ["checkpoint-3", "checkpoint-5"]
    with pytest.raises(StoreError, match=r"no run 'x-1'.*recorded are"):
        probe.load_run("x-1", compared.store.root)


def test_its_tables_are_those_of_the_report(compared: Compared):
    run, report = probe.load_run(compared.first.run_id, compared.store.root), compared.first.report
    assert run.results().equals(report.table("results.parquet"))
    assert run.results().schema.metadata[b"run"].decode() == run.id
    assert run.table("agreement").equals(report.table("agreement.parquet"))
    with pytest.raises(StoreError, match=r"no table 'results\.parquet'.*use one of agreement, .*results"):
        run.table("results.parquet")
    tokens = {name: run.tokens(name) for name in run.checkpoints}
    assert run.tokens().equals(tokens["checkpoint-5"]) and not run.tokens().equals(tokens["checkpoint-3"])
    with pytest.raises(StoreError, match=r"no checkpoint 'checkpoint-4'.*use one of checkpoint-3, checkpoint-5"):
        run.tokens("checkpoint-4")


def test_what_is_to_be_known_of_any_checkpoint_is_said_once(compared: Compared, tmp_path: Path):
    folder = runs.folder(tmp_path, compared.first.run_id)
    shutil.copytree(compared.first.run_directory, folder)
    record = json.loads((folder / runs.RECORD).read_text())
    for entry, own in zip(record["checkpoints"], ("of the first", "of the last"), strict=True):
        entry["warnings"] = ["of both", own]
    (folder / runs.RECORD).write_text(json.dumps(record))
    expected = ["of both", "of the first", "of the last"]
    assert [one for one in probe.load_run(folder.name, tmp_path).warnings if one.startswith("of ")] == expected
    _, config, recorded = read_run(compared.store, compared.first.run_id)
    recorded = [old | {"warnings": new["warnings"]} for old, new in zip(recorded, record["checkpoints"], strict=True)]
    run = Counting(compared.store, Execution(paths={}, device="cpu"))
    statistics.reported(recorded, config, run)
    assert run.inputs("report")["warnings"] == expected


def test_in_a_terminal_it_is_the_answer_and_in_a_notebook_the_report_in_a_frame(compared: Compared):
    run = probe.load_run(compared.ridge.run_id, compared.store.root)
    said = " ".join(repr(run).split())
    assert said.startswith(f"{run.id}, recorded at {run.finished:%Y-%m-%d %H:%M} UTC, a rerun of {run.rerun_of} ")
    assert said.endswith(run.answer) and run.answer in (run.directory / "report.md").read_text(encoding="utf-8")
    assert all(f"WARNING: {warning}" in said for warning in run.warnings)
    shown = run._repr_html_()
    [content] = re.findall(r'^<iframe title="[^"]+" sandbox="allow-scripts" srcdoc="([^"]*)" style="[^"]+">', shown)
    assert html.unescape(content) == (run.directory / "report.html").read_text(encoding="utf-8")
    assert shown.endswith("</iframe>") and shown.count("<") == 2


def test_runs_are_listed_and_compared_from_python(compared: Compared, tmp_path):
    root = compared.store.root
    assert probe.recorded_runs(root) == runs.recorded(root)
    run, rerun = (probe.load_run(one.run_id, root) for one in (compared.first, compared.ridge))
    found = probe.compare(run, rerun, folder=tmp_path)
    assert isinstance(found, probe.Comparison) and found.folder == tmp_path
    assert found.table().to_pylist() == found.rows == compare(compared.store, [run.id, rerun.id], tmp_path).rows
    assert found.table().schema.metadata[b"runs"].decode().split() == [run.id, rerun.id]
    assert " ".join(repr(found).split()) == " ".join(found.answers)
    [content] = re.findall(r'^<iframe title="[^"]+" sandbox="allow-scripts" srcdoc="([^"]*)"', found._repr_html_())
    shown = html.unescape(content)
    assert shown == (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "what differs is baseline ridge" in shown and 'src="data:image/svg+xml;base64,' in shown


def test_only_runs_of_one_store_are_compared_from_python(compared: Compared, tmp_path):
    root = Path(shutil.copytree(compared.store.root / "runs", tmp_path / "a" / "runs").parent)
    run, elsewhere = probe.load_run(compared.first.run_id, compared.store.root), probe.load_run("latest", root)
    with pytest.raises(StoreError, match=rf"{elsewhere.id} is in {root}, and {run.id} in .*store export"):
        probe.compare(run, elsewhere, folder=tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_run_without_a_page_shows_the_answer(compared: Compared, tmp_path):
    root = Path(shutil.copytree(compared.store.root / "runs", tmp_path / "a" / "runs").parent)
    (runs.folder(root, compared.first.run_id) / "report.html").unlink()
    run = probe.load_run(compared.first.run_id, root)
    assert run._repr_html_() == f"<pre>{html.escape(repr(run))}</pre>"
    with pytest.raises(StoreError, match=r"first-order-u/.* cannot be used"):
        run.tokens()  # which are not in the folder of the run


def test_the_notebook_of_the_documentation_runs(compared: Compared, monkeypatch):
    monkeypatch.chdir(compared.store.root.parent)
    shown = execute(NOTEBOOK)
    assert len(shown) == len(cells(NOTEBOOK)) and isinstance(shown[0], probe.RecordedRun)
    rows = [row for value in shown if isinstance(value, list) for row in value]
    assert {"verdict", "share_per_token"} <= {name for row in rows for name in row}
    at_lr, changes = ([row for row in rows if "verdict" in row and name in row] for name in ("H", "difference"))
    assert [row["checkpoint"] for row in at_lr] == ["checkpoint-3", "checkpoint-5"]
    assert [row["step"] for row in changes] == [3, 5]
    [comparison] = [value for value in shown if isinstance(value, probe.Comparison)]
    assert {row["run"] for row in comparison.rows} == {probe.recorded_runs()[0]}

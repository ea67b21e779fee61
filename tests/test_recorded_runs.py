"""Recorded runs from Python: their tables, what they show of themselves, and the notebook of the documentation."""

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compared_fixtures import Compared
from notebooks import cells, execute

import entropy_core as probe
from entropy_core.errors import StoreError
from entropy_core.store import runs

pytest_plugins = ["compared_fixtures"]
ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "from-python.ipynb"


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
    assert [row["checkpoint"] for row in rows if "verdict" in row] == ["checkpoint-3", "checkpoint-5"]

"""The commands of the README and of its pages that need a server, on the demo run. Run by `make test-sweep`."""

import json
import math
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from demo_fixtures import COMMAND, DEMO_RUN, ROOT, demo_run_in_use, documented_commands, run, run_directory
from pipeline_fixtures import whole

from entropy_core.checkpoints.optimizer_step import OptimizerStep
from entropy_core.estimates.tables import RESULTS
from entropy_core.execution import Execution
from entropy_core.numerics.vectors import in_blocks
from entropy_core.store.artifact import Artifact
from flows.door import read_key
from flows.service import HOME, request

pytestmark = pytest.mark.sweep


@pytest.fixture(scope="module")
def first() -> str:
    return run(["make", "sweep"])


@pytest.fixture(scope="module")
def again(first: str) -> str:
    return run(["make", "sweep"])


@pytest.fixture(scope="module")
def rows(first: str) -> list[dict]:
    return pq.read_table(run_directory(first) / "results.parquet").to_pylist()


@pytest.fixture(scope="module")
def served(again: str) -> Iterator[str]:
    """The UI and the deployments, as `make ui` keeps them up; the URL of the API."""
    command = [str(COMMAND), "ui", "configs/demo.yaml", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield next(found[1] for line in process.stdout if (found := re.search(r"PREFECT_API_URL=(\S+)", line)))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def test_the_sweep_prints_a_table_for_every_checkpoint_and_step_size(first, rows):
    assert len({row["checkpoint"] for row in rows}) >= 3
    assert len({row["eta_over_lr"] for row in rows}) >= 5
    assert "prefect deployment run entropy-probe/checkpoint-sweep" in first
    for row in rows:
        assert row["checkpoint"] in first


def test_a_second_sweep_computes_nothing_and_has_the_same_results(first, again):
    assert run_directory(again) == run_directory(first)
    assert not re.search(r"^ *computed ", again, re.MULTILINE)
    assert "loaded the policy" not in again
    assert re.search(r"^ *reused +\d+ stage runs: load-", again, re.MULTILINE)


def test_no_process_is_left_behind(again):
    assert [line for line in map(of_this_store, psutil.process_iter()) if line] == []


def of_this_store(process: psutil.Process) -> str:
    """The command line of a process of Prefect's or of this project, unless it works for a store elsewhere."""
    with suppress(psutil.Error):  # it has ended
        line, home = " ".join(process.cmdline()), process.environ().get("PREFECT_HOME", "")
        here = home == str(ROOT / "artifacts" / "prefect") if home else process.cwd() == str(ROOT)
        return line if here and str(ROOT) in line and ("flows." in line or "prefect" in line) else ""
    return ""


def test_results_hold_what_the_theory_says(rows):
    assert pq.read_schema(run_directory_of(rows) / "results.parquet").names == RESULTS.names
    for row in rows:
        assert row["gradient_check"] <= 1e-5
        assert abs(row["mean_score_z"]) <= 3
        if row["eta"] == 0:
            assert row["delta_h"] == 0.0
            assert row["delta_h1"] == 0.0


def run_directory_of(rows: list[dict]) -> Path:
    records = sorted((ROOT / "artifacts" / "runs").glob("demo-*/run.json"), key=lambda path: path.stat().st_mtime_ns)
    return records[-1].parent


def test_the_prediction_is_linear_in_the_step_size(rows):
    for group in groups(rows, "checkpoint", "normalization"):
        slopes = [row["delta_h1"] / row["eta"] for row in group if row["eta"]]
        assert max(slopes) - min(slopes) <= 1e-12 * abs(slopes[0])


def test_the_difference_from_the_prediction_is_of_second_order(rows):
    for group in groups([row for row in rows if row["estimator"] == "per_decision"], "checkpoint", "normalization"):
        by_eta = {round(row["eta_over_lr"], 6): row for row in group}
        assert abs(by_eta[0.01]["paired_difference"]) <= 0.01 * abs(by_eta[0.01]["delta_h1"])
        above = [row for row in group if 0 < row["eta_over_lr"] < 0.5]
        above = [row for row in above if abs(row["paired_difference"]) > 10 * row["noise_floor"]]
        assert len(above) >= 2
        for small, large in pairwise(sorted(above, key=lambda row: row["eta"])):
            growth = math.log(large["paired_difference"] / small["paired_difference"])
            assert abs(growth / math.log(large["eta"] / small["eta"]) - 2) <= 0.1


def test_snis_agrees_with_the_prediction_at_the_learning_rate_or_is_not_said_to_be_linear(rows):
    for row in rows:
        if row["estimator"] == "snis" and round(row["eta_over_lr"], 6) == 1:
            near = abs(row["delta_h"] - row["delta_h1"]) <= 3 * row["delta_h_se"]
            assert near or row["linearity"] != "linear"


def test_v_is_the_step_of_torch_on_every_checkpoint(rows):
    """The saved optimizer, loaded by torch into the real model, given the probe's gradient, makes the probe's step."""
    from transformers import AutoModelForCausalLM, Trainer

    store = ROOT / "artifacts"
    record = json.loads((run_directory_of(rows) / "run.json").read_text())
    for entry in record["checkpoints"]:
        update = Artifact.from_dict(entry["inputs"]["update"]["artifact"], store)
        upstream = [Artifact.from_dict(one, store) for one in update.manifest["upstream"]]
        loaded = next(one for one in upstream if one.stage == "load-checkpoint")
        gradient = {name: g.double() for name, g in update.vector("gradient").items()}

        directory = DEMO_RUN / entry["checkpoint"]
        execution = Execution(paths={loaded.summary["optimizer"]: directory / "optimizer.pt"})
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        decays = set(Trainer.get_decay_parameter_names(None, model))
        named = dict(model.named_parameters())
        groups = [[p for n, p in named.items() if n in decays], [p for n, p in named.items() if n not in decays]]
        optimizer = torch.optim.AdamW([{"params": group} for group in groups])
        optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True))
        before = {name: p.detach().clone() for name, p in named.items()}
        for name, p in named.items():
            p.grad = gradient[name].clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)  # active here
        clip = 0.1 / (torch.nn.utils.get_total_norm(list(gradient.values())).item() + 1e-6)
        assert clip < 1
        optimizer.step()

        lr = optimizer.param_groups[0]["lr"]
        assert lr > 0
        step = whole(OptimizerStep(loaded, execution, before, in_blocks(gradient), clip).part("direction"), before)
        missed = sum(float(((p.detach() - before[n]) / lr - step[n]).square().sum()) for n, p in named.items())
        size = sum(float(step[name].square().sum()) for name in named)
        assert (missed / size) ** 0.5 <= 1e-12


def test_the_flow_run_is_completed_in_the_ui(served):
    runs = request(f"{served}/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 2})
    assert [one["state"]["type"] for one in runs] == ["COMPLETED", "COMPLETED"]
    tasks = request(f"{served}/task_runs/filter", {"flow_runs": {"id": {"any_": [runs[0]["id"]]}}})
    of_stages = [task["state"]["name"] for task in tasks if " · " in task["name"]]
    assert len(of_stages) > 100 and set(of_stages) == {"Cached"}
    around = {"plan", "results", *(path.name for path in DEMO_RUN.glob("checkpoint-*"))}
    assert {task["name"] for task in tasks} >= around


def test_the_statistics_run_again_without_checkpoints(served, rows, tmp_path):
    """Every `prefect deployment run entropy-probe/variance` of the documentation, with the checkpoints moved away."""
    commands = [c for c in documented_commands() if "entropy-probe/variance" in c]
    assert commands
    away = DEMO_RUN.with_name("demo-run-moved-away")
    with demo_run_in_use(), ExitStack() as stack:
        DEMO_RUN.rename(away)
        stack.callback(away.rename, DEMO_RUN)
        for command in commands:
            run(
                [sys.executable, "-m", *shlex.split(command)],
                PREFECT_API_URL=served,
                PREFECT_API_AUTH_STRING=read_key(HOME),
                PREFECT_HOME=str(ROOT / "artifacts" / "prefect"),
            )
            latest = request(f"{served}/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})[0]
            tasks = request(f"{served}/task_runs/filter", {"flow_runs": {"id": {"any_": [latest["id"]]}}})
            stages = {"variance", "price", "agreement", "report"}
            assert {task["name"].partition(" ")[0] for task in tasks} == stages | {"results"}
    redone = pq.read_table(run_directory_of(rows) / "results.parquet").to_pylist()
    assert {row["confidence_level"] for row in redone} != {row["confidence_level"] for row in rows}
    assert [row["delta_h1"] for row in redone] == [row["delta_h1"] for row in rows]


@pytest.mark.parametrize("era", ["seed_era", "final_era"])
def test_an_old_configuration_runs_on_the_demo_run(first, era, tmp_path):
    """Converted and swept by the two commands of docs/from-the-old-config.md."""
    new = tmp_path / f"{era}.yaml"
    new.write_text(run([str(COMMAND), "legacy", f"tests/legacy/{era}.yaml"]))
    rows = pq.read_table(run_directory(run(["make", "sweep", f"CONFIG={new}"])) / "results.parquet").to_pylist()
    assert {row["n_sequences"] for row in rows} == {8 * 4}  # distinct mode, B_E_values × G
    assert {row["n_prompts_u"] for row in rows} == {8}
    expected = {"seed_era": [0.0, 2e-4], "final_era": [0.0, 8e-7, 1.6e-6, 1.28e-5]}[era]
    assert sorted({row["eta"] for row in rows}) == pytest.approx(expected)
    assert {row["checkpoint"] for row in rows} == {"checkpoint-12" if era == "seed_era" else "checkpoint-24"}


def groups(rows: list[dict], *names: str) -> list[list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.values())

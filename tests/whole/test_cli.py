"""The console command: what it prints, its exit status, that it needs neither Prefect nor its own folder."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_fixtures import NAMES, make_run, probe, skip_figures, values, write_reward

from entropy_core.config.schema import VarianceConfig
from entropy_core.store import runs
from entropy_core.store.store import Store
from flows import cli, store_commands
from flows.cli import main

COMMANDS = (
    *("sweep", "plan", "init", "watch", "variance", "runs", "compare", "report", "power", "store", "legacy", "ui"),
    "serve",
)
WITHOUT_PREFECT = """
import sys
sys.modules["prefect"] = None  # importing it is an error
from flows.cli import main
sys.exit(main(sys.argv[1:]))
"""
OF_NO_USE_TO_THE_STATISTICS = (
    *("prefect", "transformers", "tokenizers", "trl", "peft", "datasets", "huggingface_hub"),
    "matplotlib.pyplot",
)
WITH_THE_STATISTICS_ALONE = WITHOUT_PREFECT.replace(
    'sys.modules["prefect"] = None', f"sys.modules.update(dict.fromkeys({OF_NO_USE_TO_THE_STATISTICS}))"
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A run, a reward, and in a folder of its own a configuration that names them by relative paths."""
    make_run(tmp_path / "run")
    write_reward(tmp_path)
    config = values(Path("../run"), Path("../artifacts"), checkpoints=[f"../run/{NAMES[0]}"])
    config["update"] = {"reward": "../reward.py:share_of_low_digits"}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


def command(*arguments: Any, cwd: Path, code: str = WITHOUT_PREFECT) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONSAFEPATH": "1"}
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


# --- help ------------------------------------------------------------------------------------------------------------


def test_the_help_names_every_command_and_loads_nothing(tmp_path, capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^    (\w+) ", said, re.MULTILINE) == list(COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit, match=r"^0$"):
            main([name, "--help"])
        assert f"usage: entropy-probe {name}" in capsys.readouterr().out
    help_of_all = "import sys\nfrom flows.cli import main\nmain([])\nprint(*sys.modules, file=sys.stderr)\n"
    list_a_store = f"main(['store', 'ls', '--artifacts', {str(tmp_path)!r}])\nprint(*sys.modules, file=sys.stderr)"
    by_help, by_store = (
        set(line.split()) for line in command(cwd=tmp_path, code=help_of_all + list_a_store).stderr.splitlines()
    )
    assert not {"torch", "prefect", "pydantic", "pyarrow", "yaml"} & by_help
    assert not {"torch", "prefect", "pyarrow", "transformers"} & by_store and "entropy_core.store.store" in by_store


def test_the_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert re.fullmatch(r"entropy-probe \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_every_setting_of_the_statistics_has_an_option():
    given = ["--confidence", ".9", "--baseline", "ridge", "--cluster", "prompt"]
    options = cli._parser().parse_args(["variance", "a-run", *given, "--normalizations", "per_token"])
    asked = cli._request(options)
    assert asked.applied_to(VarianceConfig()) == VarianceConfig(
        confidence_level=0.9, baseline="ridge", cluster="prompt", normalizations=["per_token"]
    )
    assert (asked.run, asked.artifacts) == ("a-run", str(Path.cwd() / "artifacts"))
    nothing = cli._request(cli._parser().parse_args(["variance"]))
    assert nothing.applied_to(VarianceConfig(cluster="prompt")) == VarianceConfig(cluster="prompt")


# --- without Prefect, from another folder ----------------------------------------------------------------------------


def test_a_sweep_without_prefect_from_another_folder(home, tmp_path, monkeypatch, capsys):
    """It computes what the pipeline computes, in the store that the configuration names; then everything is reused."""
    config, elsewhere = home / "configs" / "tiny.yaml", home / "elsewhere"
    for name in ["prefect", *(name for name in sys.modules if name.startswith("prefect."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(elsewhere)

    def here(*arguments: Any) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    total = int(re.search(r"0 of (\d+) stage runs are cached", here("plan", "../configs/tiny.yaml"))[1])
    assert not (home / "artifacts").exists()

    assert main(["sweep", "../configs/tiny.yaml", "--direct"]) == 0
    first = capsys.readouterr()
    lines = re.findall(r"^  computed  (\S+) · .+  \((?:(\d+) parts, )?\S+ m?s\)$", first.out, re.MULTILINE)
    assert sum(int(parts or 1) for _, parts in lines) == total and "reused" not in first.out
    assert lines[-1][0] == "report" and f"{total} of {total} stages" in first.out
    assert first.out.count("  measured  checkpoint-") == 1
    assert "matched by name for 12 of 12 trained parameters" in first.err and "Traceback" not in first.err

    again = here("sweep", config, "--direct")
    assert f"\n  reused    {total} stage runs: load-" in again and "computed" not in again and "measured  " not in again
    table = first.out.partition("\n\n")[2]
    assert table == again.partition("\n\n")[2] and "eta_over_lr" in table and str(home / "artifacts") in table
    assert list(elsewhere.iterdir()) == []

    skip_figures(monkeypatch)
    same = values(home / "run", tmp_path / "other", checkpoints=[str(home / "run" / NAMES[0])])
    same["update"] = {"reward": f"{home}/reward.py:share_of_low_digits"}
    expected = probe(same).rows
    assert recorded_rows(home / "artifacts", -1) == expected

    options = ("--confidence", ".5", "--artifacts", home / "artifacts", "--direct")
    changed = command("variance", *options, cwd=elsewhere, code=WITH_THE_STATISTICS_ALONE)
    assert changed.returncode == 0, changed.stderr
    stages = re.findall(r"^  (\S+) +(\S+) · ", changed.stdout, re.MULTILINE)
    assert stages == [("computed", "variance"), ("reused", "agreement"), ("computed", "report")]
    assert {row["confidence_level"] for row in recorded_rows(home / "artifacts", -1)} == {0.5}
    assert {row["confidence_level"] for row in recorded_rows(home / "artifacts", 0)} == {0.95}
    assert runs.find(home / "artifacts", "latest").name == runs.recorded(home / "artifacts")[0]

    listed = here("runs", "--artifacts", home / "artifacts").splitlines()
    first_id, second_id = runs.recorded(home / "artifacts")
    assert [line.split(maxsplit=3)[1:] for line in listed[1:-1]] == [
        [first_id, "–", f"sweep of {NAMES[0]} (1)"],
        [second_id, first_id, "confidence_level 0.5"],
    ]
    assert listed[-1] == f"2 runs in {home / 'artifacts' / 'runs'}"
    opened = here("report", first_id, "--artifacts", home / "artifacts")
    page = runs.folder(home / "artifacts", first_id) / "report.html"
    assert opened.lstrip("\n").startswith(table.partition(f"\n{home}")[0]) and opened.endswith(f" {page}\n")
    assert "Responses of U, token by token" in page.read_text(encoding="utf-8")
    assert "1 would run" not in here("store", "explain", config)


def recorded_rows(root: Path, which: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(runs.folder(root, runs.recorded(root)[which]) / "results.parquet").to_pylist()


def test_ctrl_c_ends_a_direct_sweep_and_the_same_command_goes_on(home, monkeypatch, capsys):
    skip_figures(monkeypatch)
    config = str(home / "configs" / "tiny.yaml")
    line = [sys.executable, "-c", WITHOUT_PREFECT, "sweep", config, "--direct"]
    with subprocess.Popen(line, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        next(line for line in process.stdout if line.startswith("  computed  score-e-batch"))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert said.endswith("\nStopping …\n") and "Traceback" not in said
    finished = {(one.stage, one.key): one.digest for one in Store(home / "artifacts").ls()}
    assert {"load-prompts", "sample-e-batch", "score-e-batch"} <= {stage for stage, _ in finished}
    assert main(["sweep", config, "--direct"]) == 0
    assert sum(map(int, re.findall(r"  reused +(\d+) stage run", capsys.readouterr().out))) == len(finished)


def test_a_list_of_runs_says_what_each_is(tmp_path, capsys):
    assert main(["runs", "--artifacts", str(tmp_path)]) == 0
    assert f"0 runs in {tmp_path}" in capsys.readouterr().out
    parents, clusters = ("", "", "probe-1", "gone"), ("auto", "auto", "prompt", "auto")
    for number, names in enumerate((["a"], ["a", "b"], ["a", "b", "c"], ["a"])):
        folder = runs.folder(tmp_path, f"probe-{number}")
        folder.mkdir(parents=True)
        record = {
            "finished": f"2026-01-0{number + 1}T10:11:12+00:00",
            "rerun_of": parents[number],
            "config": {
                "name": f"n{number}",
                "variance": {"cluster": clusters[number]},
            },
            "checkpoints": [{"checkpoint": name} for name in names],
            "report": {"stage": "report", "key": "0" * 32, "digest": "0" * 64},
        }
        (folder / runs.RECORD).write_text(json.dumps(record))
    assert main(["runs", "--artifacts", str(tmp_path)]) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert re.split("  +", head) == ["finished", "run", "rerun of", "what it is"]
    assert last == f"4 runs in {tmp_path / 'runs'}"
    assert [re.split("  +", row) for row in rows] == [
        ["2026-01-01T10:11Z", "probe-0", "–", "sweep of a (1)"],
        ["2026-01-02T10:11Z", "probe-1", "–", "sweep of a b (2)"],
        ["2026-01-03T10:11Z", "probe-2", "probe-1", "cluster prompt"],
        ["2026-01-04T10:11Z", "probe-3", "gone", "its parent is not recorded any more"],
    ]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sweep", "no.yaml"], "no.yaml cannot be read"),
        (["sweep", "no.yaml", "--direct"], "no.yaml cannot be read"),
        (["plan", "no.yaml"], "no.yaml cannot be read"),
        (["ui", "no.yaml"], "no.yaml cannot be read"),
        (["legacy", "no.yaml"], "no.yaml cannot be read"),
        (["store", "explain", "no.yaml"], "no.yaml cannot be read"),
        (["store", "explain", "0123"], "'0123' names no artifact"),
        (["store", "explain", "0", "1", "2"], "give one key, two keys or a configuration"),
        (["store", "export", "latest", "file.tar"], "there is no run 'latest'"),
        (["store", "import", "file.tar"], "file.tar"),
        (["variance"], "there is no run 'latest'"),
        (["variance", "a-run", "--direct"], "there is no run 'a-run'"),
        (["variance", "--confidence", "95"], "confidence_level: must be less than"),
        (["variance", "--confidence", "nan"], "confidence_level: must be a finite number"),
        (["variance", "--baseline", "mean"], "baseline: must be 'as_recorded'"),
        (["variance", "--normalizations", "per_token", "per_token"], "per_token is listed twice"),
    ],
)
def test_an_error_is_a_line_and_the_status_is_2(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert said in line and line.endswith(".") and printed.out == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != ".locks"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["sweep"], ["store"], ["store", "prune", "--keep-runs", "-1"], ["variance", "--x"]]
)
def test_a_wrong_command_line_says_how_it_is_used(capsys, arguments):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    assert capsys.readouterr().err.startswith("usage: entropy-probe")


def test_an_error_of_the_system_is_told_like_any_other(monkeypatch, capsys, tmp_path):
    def away(*_: Any) -> int:
        raise OSError(116, "Stale file handle", "artifacts/x")

    monkeypatch.setattr(store_commands, "ls", away)
    assert main(["store", "ls"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search("Stale file handle.*cause: .*run the same again", said)


def test_a_reader_that_has_seen_enough_is_no_error(home):
    (home / "artifacts" / "runs").mkdir(parents=True)
    code = "import os, sys\nos.close(0)\nfrom flows.cli import main\nsys.exit(main(['store', 'ls']))"
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-c", code]
    with os.fdopen(writing) as closed:
        done = subprocess.run(line, cwd=home, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") or "Traceback" not in done.stderr


def test_what_is_wrong_in_a_configuration_is_reported_together_before_anything_starts(home, capsys, monkeypatch):
    monkeypatch.setattr("flows.service.service", lambda *_, **__: pytest.fail("Prefect was started"))
    path = home / "configs" / "bad.yaml"
    path.write_text(
        "checkpoints: [../run/checkpoint-*, ../run/step-*]\n"
        "batch_config: {G: 1:30, B_U: 010, E_total_sequence: 16, dataset_name: pool.jsonl}\n"
        "batch_config: {G: 1:30, B_U: 010, E_total_sequence: 16, dataset_name: pool.jsonl}\n"
        "generation: {top_p: .9, max_new_tokens: 8, max_new_tokens: 16}\n"
        "update: {learning_rate: true, reward: rewards.py:exact, scale_rewards: group, loss: reinforce}\n"
        "importance: {etas: [0, 1, 1]}\n"
    )
    expected = f"""\
{path} has 12 errors:
  batch_config: is there twice, in lines 2 and 3
  max_new_tokens: is there twice, in line 4
  checkpoints.1: no directory matches {home}/run/step-*; a run's checkpoints are usually RUN/checkpoint-*
  batch_config.B_U: must be an integer, not the string "010"
  batch_config.G: must be an integer, not the string "1:30"
  batch_config.dataset_name: there is no file {home}/configs/pool.jsonl
  batch_config.E_total_sequence: unknown key; the closest known key is batch_config.E_total_sequences
  generation.top_p: it is 0.9, but E must be sampled from the policy itself"""
    for arguments in (["sweep", str(path)], ["sweep", str(path), "--direct"], ["plan", str(path)]):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith(expected)
        rest = said.splitlines()[len(expected.splitlines()) :]
        assert rest == [
            "  update.scale_rewards: reinforce compares no responses within a group. Set scale_rewards: auto",
            "  update.learning_rate: must be a number, not true",
            f"  update.reward: there is no file {home}/configs/rewards.py",
            "  importance.etas: 1.0 is listed twice.",
            "Fix: correct them; docs/configuration.md lists all keys.",
        ]

"""`entropy-probe watch` beside a run that saves and rotates: everything is probed once, whoever is killed when."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from filelock import FileLock
from pipeline_fixtures import call_here, probe, skip_figures, values
from watch_fixtures import NAMES, becomes, make_checkpoints, rows_of, save_again, trained, write_config

from entropy_core.checkpoints import complete
from entropy_core.checkpoints.complete import what_is_missing
from entropy_core.config.read import load_config
from entropy_core.errors import CheckpointError, ConfigError, StoreError
from entropy_core.execution import Execution
from entropy_core.files.checkpoint import checkpoint_digest
from entropy_core.files.holding import digest_now, held_in, hold, listing, release
from entropy_core.files.run_folder import numbers_file
from entropy_core.files.sources import require_untouched
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.settings import Setting
from entropy_core.pipeline.watched import Watched
from flows import growing_sweep
from flows.cli import main
from flows.watch import watch
from flows.watch_options import Asked


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    return make_checkpoints(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    skip_figures(monkeypatch)
    call_here(monkeypatch)
    (tmp_path / "run").mkdir()
    write_config(tmp_path, tmp_path / "run")
    return tmp_path


def asked(home: Path, **more) -> Asked:
    return Asked(run=home / "run", config=home / "probe.yaml", every=0.05, **more)


def watch_folder(home: Path) -> Path:
    digest = hashlib.sha256(str(home / "run").encode()).hexdigest()[:8]
    return home / "artifacts" / "watch" / f"run-{digest}"


def held_folder(home: Path) -> Path:
    return watch_folder(home) / "held"


def test_each_checkpoint_of_a_run_that_rotates_is_probed_and_then_released(home, checkpoints, capfd):
    def held_or_probed(name: str) -> bool:
        return becomes(
            lambda: any((home / "artifacts").glob(f"watch/*/held/{name}")) or numbers_file(home / "run", name).exists()
        )

    with trained(checkpoints, home / "run", keep=1, until=held_or_probed):
        assert watch(asked(home)) == 0
    rows = rows_of(home / "artifacts")
    assert list(dict.fromkeys(row["checkpoint"] for row in rows)) == list(NAMES)
    assert held_in(held_folder(home)) == []
    assert [path.name for path in (home / "run").glob("checkpoint-*")] == [NAMES[-1]]
    told = json.loads(numbers_file(home / "run", NAMES[0]).read_text())
    (row, *_) = [row for row in rows if row["checkpoint"] == NAMES[0] and row["eta_over_lr"] == 1]
    assert told["H"] == pytest.approx(row["H"], rel=1e-3) and told["verdict"] == row["verdict"]
    assert told["delta_h1"] == pytest.approx(row["delta_h1"], rel=1e-3) and told["step"] == 2
    said = capfd.readouterr().out
    assert said.count("is complete and held") == 3 and "by links" in said
    assert "left out" not in said

    # a sweep of a directory that still has all of them finds everything computed, though it lies elsewhere
    config = load_config(home / "probe.yaml", checkpoints=[str(checkpoints)])
    later = probe(values(checkpoints, home / "artifacts", **config.model_dump(mode="json", exclude_unset=True)))
    assert set(later.run.was_computed) <= {"agreement", "report"}
    assert later.rows == rows


# --- what is complete ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(checkpoints, tmp_path) -> Path:
    return save_again(checkpoints / NAMES[0], tmp_path)


def test_a_checkpoint_is_complete_when_its_trainer_state_is_the_last_word(saved, monkeypatch):
    assert what_is_missing(saved) == ""
    state = (saved / "trainer_state.json").read_bytes()
    (saved / "trainer_state.json").write_bytes(state[:-1])
    assert what_is_missing(saved) == "trainer_state.json is half-written"
    (saved / "trainer_state.json").write_bytes(state)
    later = time.time() + 1
    os.utime(saved / "optimizer.pt", (later, later))
    assert "optimizer.pt is younger" in what_is_missing(saved)
    monkeypatch.setattr(complete, "QUIET", -10.0)  # and then nothing is written any more
    assert what_is_missing(saved) == ""
    shutil.rmtree(saved)
    assert what_is_missing(saved)


def test_a_checkpoint_that_is_being_deleted_is_not_complete(saved, monkeypatch):
    """Its trainer_state.json may be the last file to go; without a generation config, say, it is another checkpoint."""
    (saved / "ref").mkdir()
    (saved / "ref" / "adapter.safetensors").write_bytes(b"")
    state = saved / "trainer_state.json"
    state.write_bytes(state.read_bytes())
    assert what_is_missing(saved) == ""
    time.sleep(0.05)  # clocks of file systems are coarse
    (saved / "ref" / "adapter.safetensors").unlink()
    assert what_is_missing(saved) == "a file of it was deleted a moment ago"
    monkeypatch.setattr(complete, "QUIET", -1.0)  # somebody has tidied up, long ago
    assert what_is_missing(saved) == ""


def test_without_a_trainer_state_it_is_the_trainers_half_or_has_to_be_quiet(saved, monkeypatch):
    (saved / "trainer_state.json").unlink()
    (saved / "training_args.bin").write_bytes(b"")
    assert what_is_missing(saved) == "there is no trainer_state.json, which its trainer writes last"
    (saved / "training_args.bin").unlink()
    assert what_is_missing(saved).startswith("it was written to")
    monkeypatch.setattr(complete, "QUIET", -1.0)
    assert what_is_missing(saved) == ""
    (saved / "optimizer.pt").unlink()
    assert what_is_missing(saved) == "there is no optimizer's state"


def test_an_adaptive_entropy_bonus_is_written_after_the_state(saved, monkeypatch):
    (saved / "training_args.bin").write_bytes(b"")
    (saved / "trainer_state.json").write_bytes((saved / "trainer_state.json").read_bytes())
    os.utime(saved / "training_args.bin", (1, 1))
    for adaptive, missing in ((False, ""), (True, "there is no entropy_ctrl_state.json yet")):
        said = ("trl.GRPOConfig", {"use_adaptive_entropy": adaptive})
        monkeypatch.setattr(complete, "read_training_arguments", lambda _, said=said: said)
        assert what_is_missing(saved) == missing
    (saved / "entropy_ctrl_state.json").write_text("{}")
    assert what_is_missing(saved) == ""


# --- holding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
def test_what_is_held_outlives_its_source(saved, tmp_path, monkeypatch, links):
    (saved / "ref").mkdir()
    (saved / "ref" / "adapter_config.json").write_text("{}")
    (saved / "link.json").symlink_to("config.json")
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    content = {path.name: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    listed = listing(saved)
    assert hold(saved, tmp_path / "held" / "c", listed) is links
    assert listing(tmp_path / "held" / "c") == listed
    shutil.rmtree(saved)
    assert {p.name: p.read_bytes() for p in (tmp_path / "held" / "c").rglob("*") if p.is_file()} == content
    assert held_in(tmp_path / "held") == [tmp_path / "held" / "c"]
    release(tmp_path / "held" / "c")
    assert list((tmp_path / "held").iterdir()) == []


def test_nothing_is_held_of_a_directory_that_goes_meanwhile(saved, tmp_path, monkeypatch):
    listed, link = listing(saved), os.link

    def rotated_meanwhile(source: Path, target: Path) -> None:
        link(source, target)
        (saved / "tokenizer.json").unlink(missing_ok=True)

    monkeypatch.setattr(os, "link", rotated_meanwhile)
    with pytest.raises(FileNotFoundError):
        hold(saved, tmp_path / "held" / "c", listed)
    assert list((tmp_path / "held").iterdir()) == []


def watched(home: Path) -> Watched:
    config = load_config(home / "probe.yaml", checkpoints=[str(home / "run")])
    return Watched(home / "run", home / "watch", config)


def test_a_rotation_that_is_faster_is_said(home, checkpoints, monkeypatch):
    saved = save_again(checkpoints / NAMES[0], home / "run")
    (saved / "trainer_state.json").unlink()
    (saved / "training_args.bin").write_bytes(b"")
    one = watched(home)
    assert one.look() == [] and one.waiting() == []
    save_again(checkpoints / NAMES[1], home / "run")
    lines = one.look()
    assert len(lines) == 2 and lines[0].startswith(f"{NAMES[1]} is complete and held")
    assert lines[1].startswith(f"{NAMES[0]} is left out as long as it is incomplete: there is no trainer_state.json")
    assert one.look() == []  # each line once
    shutil.rmtree(saved)
    (line,) = one.look()
    assert line.startswith(f"{NAMES[0]} is left out: it was deleted before it could be held")


def test_a_checkpoint_that_is_saved_again_is_held_again(home, checkpoints):
    one = watched(home)
    save_again(checkpoints / NAMES[0], home / "run")
    one.look()
    (held,) = one.waiting()
    one.probed(held, digest_now(held), "a-sweep")
    assert one.look() == [] and one.waiting() == []
    one.release_probed()
    assert not held.exists() and one.look() == []

    again = watched(home)  # another process, which knows
    assert again.sweep == "a-sweep" and again.look() == [] and again.waiting() == []
    shutil.rmtree(home / "run" / NAMES[0])
    save_again(checkpoints / NAMES[0], home / "run")  # the training was taken up before it
    assert len(again.look()) == 1 and again.waiting() == [held]


def test_under_another_configuration_nothing_is_probed_yet(home, checkpoints):
    save_again(checkpoints / NAMES[0], home / "run")
    one = watched(home)
    one.look()
    one.probed(held := one.waiting()[0], digest_now(held), "a-sweep")
    write_config(home, home / "run", batch_config={"E_total_sequences": 32, "B_U": 4, "G": 4})
    other = watched(home)
    assert other.sweep == "" and [path.name for path in other.waiting()] == [NAMES[0]]
    write_config(home, home / "run", name="another-name")
    assert watched(home).waiting() == []


# --- the command -----------------------------------------------------------------------------------------------------


def finished(home: Path, checkpoints: Path, names=NAMES) -> None:
    for name in names:
        save_again(checkpoints / name, home / "run")


def test_a_rotation_during_a_stage_costs_nothing(home, checkpoints, monkeypatch, capfd):
    """Deleting the trainer's name of a linked file sets its ctime, by which a change is told otherwise."""
    finished(home, checkpoints, NAMES[-1:])
    stamps, rotated = Execution.stamps, []

    def then_rotated(self, inputs):
        found = stamps(self, inputs)
        if any(path.is_relative_to(home / "artifacts") for path in found) and not rotated:
            rotated.append(time.sleep(0.05))  # clocks of file systems are coarse
            shutil.rmtree(home / "run" / NAMES[-1])
            shutil.rmtree(home / "run")  # and the training is over
        return found

    monkeypatch.setattr(Execution, "stamps", then_rotated)
    assert watch(asked(home)) == 0
    said = capfd.readouterr().out
    assert rotated and "left out" not in said and f"{NAMES[-1]}: H " in said


def test_a_holder_that_dies_while_a_checkpoint_is_probed_is_started_again(home, checkpoints, monkeypatch):
    finished(home, checkpoints, NAMES[:1])
    added: list[str] = []

    def meanwhile(_, held: Path) -> None:
        added.append(held.name)
        if held.name == NAMES[0]:
            for holder in [one for one in psutil.Process().children() if "flows.holder" in one.cmdline()]:
                holder.kill()
            save_again(checkpoints / NAMES[1], home / "run")
            assert becomes((held_folder(home) / NAMES[1]).is_dir)
        raise CheckpointError("nothing is computed here")

    monkeypatch.setattr(growing_sweep.GrowingSweep, "add", meanwhile)
    assert watch(asked(home, until_step=4)) == 0
    assert added == list(NAMES[:2])
    assert [one for one in psutil.Process().children() if "flows.holder" in one.cmdline()] == []


def test_a_change_of_what_is_held_is_told(saved, tmp_path):
    listed = listing(saved)
    held = tmp_path / "held" / NAMES[0]
    hold(saved, held, listed)
    execution = Execution(paths={checkpoint_digest(held): held}, held=tmp_path / "held")
    before = execution.stamps([checkpoint_digest(held)])
    shutil.rmtree(saved)
    require_untouched(before, execution.stamps([checkpoint_digest(held)]), "a stage")
    content = (held / "config.json").read_bytes()
    (held / "config.json").write_bytes(content)  # the same, at another time
    with pytest.raises(CheckpointError, match="changed while a stage read them"):
        require_untouched(before, execution.stamps([checkpoint_digest(held)]), "a stage")


def test_a_checkpoint_that_cannot_be_probed_is_left_out_and_stays(home, checkpoints, capfd):
    finished(home, checkpoints)
    (home / "run" / NAMES[0] / "optimizer.pt").write_bytes(b"no optimizer")
    later = time.time() + 1
    os.utime(home / "run" / NAMES[0] / "trainer_state.json", (later, later))
    shutil.copytree(home / "run", home / "other-run")
    assert watch(asked(home, until_step=4)) == 0
    assert {row["checkpoint"] for row in rows_of(home / "artifacts")} == {NAMES[1]}
    said = capfd.readouterr().out
    assert f"{NAMES[0]} is left out, and stays in {held_folder(home) / NAMES[0]}: " in said
    assert [path.name for path in held_in(held_folder(home))] == [NAMES[0], NAMES[2]]  # the last one waits

    save_again(checkpoints / NAMES[0], home / "run")  # it was mended; the rest was deleted meanwhile
    shutil.rmtree(home / "run" / NAMES[1])
    assert watch(asked(home, keep=True)) == 0
    assert {row["checkpoint"] for row in rows_of(home / "artifacts")} == set(NAMES)
    assert [path.name for path in held_in(held_folder(home))] == [NAMES[0], NAMES[2]]  # those held since
    assert "are kept in" in capfd.readouterr().out


def test_other_settings_of_the_training_are_no_part_of_the_sweep(home, checkpoints, monkeypatch, capfd):
    finished(home, checkpoints)
    write_config(home, home / "run", generation={"max_new_tokens": 8, "gen_batch_size": 16, "temperature": 0.5})
    assert watch(asked(home, until_step=2)) == 0

    def differing(config):
        return [
            dataclasses.replace(one, settings=(Setting("update.kl_beta", 1.0, "read"),)) for one in preflight(config)
        ]

    monkeypatch.setattr(growing_sweep, "preflight", differing)
    assert watch(asked(home)) == 0
    assert {row["checkpoint"] for row in rows_of(home / "artifacts")} == {NAMES[0]}
    assert "was trained with update.kl_beta: 1.0, and checkpoint-2 before it with 0.0" in capfd.readouterr().out


def test_without_a_configuration_the_run_says_what_it_was(home, checkpoints, capfd):
    waiting = threading.Timer(0.5, finished, (home, checkpoints, NAMES[-1:]))
    waiting.start()
    with pytest.raises(ConfigError, match="say here which function rewarded the responses"):
        watch(Asked(run=home / "run", artifacts=home / "artifacts", every=0.05))
    assert "waits for a first checkpoint" in capfd.readouterr().out
    hint = {"batch_config": {"E_total_sequences": 16, "B_U": 4, "G": 4, "dataset_name": "arithmetic"}}
    hint["update"] = {"reward": "arithmetic"}
    (home / "run" / "entropy-probe.yaml").write_text(yaml.safe_dump(hint))
    assert watch(Asked(run=home / "run", artifacts=home / "artifacts", every=0.05)) == 0
    assert {row["n_sequences"] for row in rows_of(home / "artifacts")} == {16}


def test_what_is_asked_for_wrongly_is_refused_before_anything_is_done(home, capfd):
    config = str(home / "probe.yaml")
    assert main(["watch", str(home / "nowhere")]) == 2
    assert "there is no directory" in capfd.readouterr().err
    assert main(["watch", str(home / "run"), "--config", config, "--artifacts", "here"]) == 2
    assert main(["watch", str(home / "run"), "--config", config, "--every", "0"]) == 2
    folder = home / "artifacts" / "watch" / "x"
    folder.mkdir(parents=True)
    assert not (home / "run" / "entropy-probe").exists()


def test_one_process_watches_a_run(home):
    (folder := watch_folder(home)).mkdir(parents=True)
    with FileLock(folder / "lock"), pytest.raises(StoreError, match="is being watched by another process"):
        watch(asked(home))


def test_a_sweep_that_is_gone_is_begun_anew(home, checkpoints, capfd):
    finished(home, checkpoints)
    assert watch(asked(home)) == 0
    before = rows_of(home / "artifacts")
    shutil.rmtree(home / "artifacts" / "runs")
    capfd.readouterr()
    assert watch(asked(home)) == 0
    said = capfd.readouterr().out
    assert "begins a new sweep" in said and "computed" not in said.split("nats")[0].replace("nothing computed", "")
    assert rows_of(home / "artifacts") == before


def test_ctrl_c_ends_it(home, capfd):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(SystemExit, match="130"):
        main(["watch", str(home / "run"), "--config", str(home / "probe.yaml"), "--every", "0.05"])
    assert "Stopping" in capfd.readouterr().err
    FileLock(watch_folder(home) / "lock").acquire(timeout=0).lock.release()  # it has let go of it

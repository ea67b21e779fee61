"""Kills at random moments, random damage, racing sweeps and full disks: nothing is lost, and nothing false is served.

`make chaos` runs all of it and writes docs/chaos.md; what takes seconds is part of `make test`.
"""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from attacks import in_place
from chaos_process import run_sweep
from pipeline_fixtures import make_run, probe, values
from proofs import table

from entropy_core.errors import StoreError
from entropy_core.store import runs
from entropy_core.store.manifest import json_text
from entropy_core.store.store import Stage, Store
from flows.cli import main

KILLS = 50
CORRUPTIONS = 200
RACERS = 8
PAGE = Path(__file__).resolve().parents[1] / "docs" / "chaos.md"


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A run of two checkpoints, and the store of a sweep that nobody disturbed."""
    folder = tmp_path_factory.mktemp("chaos")
    make_run(folder / "run")
    probe(settings(folder, folder / "undisturbed"))
    return folder


def settings(folder: Path, artifacts: Path) -> dict[str, Any]:
    batch = {"E_total_sequences": 32, "B_U": 4, "G": 4}
    return values(folder / "run", artifacts, batch_config=batch, importance={"etas": [0, 0.5, 1]})


@pytest.fixture(scope="module")
def processes():
    """What starts processes that have loaded everything already, so that fifty of them take minutes."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))  # read when the fork server starts, at the first process
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["chaos_process"])
        yield context


def contents(root: Path) -> dict[tuple[str, str], str]:
    """Stage and key → content digest of every artifact; and the results of every run, without when it was recorded."""
    found = {(artifact.stage, artifact.key): artifact.digest for artifact in Store(root).ls()}
    for run_id in runs.recorded(root):
        path = runs.folder(root, run_id) / "results.parquet"
        found[run_id, path.name] = repr(pq.read_table(path).to_pylist())
    return found


def complete(root: Path) -> dict[Path, tuple[int, int]]:
    """Every manifest that is visible, and which file it is."""
    found = root.glob("[!.]*/[!.]*/manifest.json")
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


@pytest.mark.chaos
def test_fifty_kills_change_nothing(home, processes, tmp_path):
    """Each kill -9 is followed by the same command; a sweep that was finished is begun anew elsewhere."""
    chance = random.Random(5)
    expected = contents(home / "undisturbed")

    def start(root: Path):
        process = processes.Process(target=run_sweep, args=(settings(home, root), tmp_path / "output"))
        process.start()
        return process

    began = time.time()
    process = start(tmp_path / "undisturbed")
    wait_for_work(process, tmp_path / "undisturbed", {}, set())
    loading = time.time() - began
    process.join()
    working = time.time() - began - loading

    lost: list[tuple[str, float]] = []
    sweeps = 0
    while len(lost) < KILLS:
        sweeps += 1
        root = tmp_path / f"sweep-{sweeps}"
        before: dict[Path, tuple[int, int]] = {}
        while True:
            left = set(unfinished(root))  # by the last one, which the next clears away
            process = start(root)
            if len(lost) < KILLS:
                if chance.random() < 0.2:
                    process.join(chance.uniform(0.0, loading))
                else:
                    wait_for_work(process, root, before, left)
                    process.join(chance.uniform(0.0, working / 3))
                killed = time.time()
                process.kill()
            process.join()
            after = complete(root)
            assert before.items() <= after.items(), "what was finished is neither lost nor computed again"
            if process.exitcode == 0:
                break
            assert process.exitcode == -9, (tmp_path / "output").read_text()[-2000:]
            assert len(unfinished(root)) <= 1, "at most the stage in hand is lost"
            in_hand = [path for path in unfinished(root) if path not in left]
            seconds = [max(0.0, killed - path.parent.stat().st_mtime) for path in in_hand]  # since it was made there
            lost.append((in_hand[0].parent.name, seconds[0]) if in_hand else (BETWEEN, 0.0))
            assert all(Store(root).check(*name)[0] for name in Store(root).names())
            before = after
        assert contents(root) == expected
        assert [path.parent.name for path in unfinished(root)] in ([], ["runs"]), "what the dead left was cleared away"
        shutil.rmtree(root)
    report(lost, sweeps, len(expected) - 1)


BETWEEN = "between stages"


def unfinished(root: Path) -> list[Path]:
    """What is being written, or was when its writer was killed."""
    return list(root.glob("[!.]*/.tmp-*"))


def wait_for_work(process, root: Path, before: dict[Path, tuple[int, int]], left: set[Path]) -> None:
    """Until a stage is begun or done that was not there before."""
    while process.is_alive() and len(complete(root)) == len(before) and set(unfinished(root)) <= left:
        time.sleep(0.01)


def report(lost: list[tuple[str, float]], sweeps: int, artifacts: int) -> None:
    rows = []
    for stage in sorted({stage for stage, _ in lost}, key=lambda stage: (stage == BETWEEN, stage)):
        seconds = [s for name, s in lost if name == stage]
        again = 0 if stage == BETWEEN else len(seconds)
        rows.append((stage, str(len(seconds)), str(again), f"{sum(seconds):.2f}", f"{max(seconds):.2f}"))
    lines = [
        "# What a kill costs",
        "",
        f"Written by `make chaos`: {len(lost)} times `kill -9` at a random moment of a sweep of {artifacts} artifacts",
        "over two tiny checkpoints, each followed by the same command; when a sweep was finished, the next was begun",
        f"in an empty store, {sweeps} in all. Every one ended with the digests of an undisturbed sweep, and nothing",
        "that was finished was computed again: what a kill costs is the stage in hand, a shard at most.",
        "",
        *table(("killed in", "kills", "stages computed again", "their seconds until then", "the longest"), rows),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    print(f"\n{text}")
    PAGE.write_text(in_place(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")


@pytest.mark.chaos
def test_racing_sweeps_compute_everything_once(home, processes, tmp_path):
    root, output = tmp_path / "artifacts", tmp_path / "output"
    racers = [processes.Process(target=run_sweep, args=(settings(home, root), output)) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    made: dict[Path, tuple[int, int]] = {}
    while any(racer.is_alive() for racer in racers):
        seen = complete(root)
        assert made.items() <= seen.items(), "nothing is computed again"
        made = seen
        time.sleep(0.02)
    assert [racer.exitcode for racer in racers] == [0] * RACERS, output.read_text()[-2000:]
    assert contents(root) == contents(home / "undisturbed")


# --- a full disk -----------------------------------------------------------------------------------------------------

FILL = """
import json, subprocess, sys
from pathlib import Path
sys.path.insert(0, "tests")
from chaos_process import run_sweep
disk, values = Path(sys.argv[1]), json.loads(sys.argv[2])
def mount(*how): subprocess.run(["mount", *how, str(disk)], check=True)
mount("-t", "tmpfs", "-o", "size=64k", "none")
try:
    for size in (64, 256, 512, 1024, 1536, 2048, 65536):
        mount("-o", f"remount,size={size}k")
        try:
            run_sweep(values, Path(sys.argv[3]))
            status = 0
        except SystemExit as error:
            status = error.code
        left = [str(path) for path in disk.glob("*/*/.tmp-*")]
        Path(sys.argv[3]).with_suffix(".said").open("a").write(json.dumps([size, status, left]) + "\\n")
        if status == 0: break
    subprocess.run(["cp", "-r", str(disk / "artifacts"), sys.argv[4]], check=True)
finally:
    subprocess.run(["umount", str(disk)], check=True)
"""


@pytest.mark.chaos
def test_a_disk_that_fills_up_loses_nothing(home, tmp_path):
    """A real one, of a few kilobytes, that grows between one run of the command and the next."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    (tmp_path / "disk").mkdir()
    sweep = settings(home, tmp_path / "disk" / "artifacts")
    command = [sys.executable, "-c", FILL, tmp_path / "disk", json.dumps(sweep), tmp_path / "log", tmp_path / "copy"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(["unshare", "-rm", *command], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    attempts = [json.loads(line) for line in (tmp_path / "log.said").read_text().splitlines()]
    assert [status for _, status, _ in attempts][-1] == 0 and len(attempts) > 2
    assert all(status == 2 and left == [] for _, status, left in attempts[:-1])
    said = [line for line in (tmp_path / "log").read_text().splitlines() if "cannot be written" in line]
    assert len(said) == len(attempts) - 1
    assert all("the disk or the quota is full" in line and "run again" in line for line in said)
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert contents(tmp_path / "copy") == contents(home / "undisturbed")


# --- damage ----------------------------------------------------------------------------------------------------------


def measure(out, execution, seed):
    import pyarrow
    import torch

    numbers = torch.arange(40, dtype=torch.float32) * (seed + 1)
    out.tensors({"numbers": numbers, "more": numbers[:7] + seed}, metadata={"seed": str(seed)})
    out.table(pyarrow.table({"id": list(range(20)), "value": [seed * 0.5 + i for i in range(20)]}), "rows.parquet")
    out.json({"seed": seed, "list": [seed] * 30}, "notes/data.json")
    return {"seed": seed, "mean": seed / 3}


MEASURE = Stage("measure", measure)


def test_two_hundred_corruptions_are_detected_and_none_is_served(tmp_path):
    chance = random.Random(7)
    store = Store(tmp_path / "store")
    sound = {seed: store.run(MEASURE, None, {"seed": seed}) for seed in range(6)}
    pristine = {seed: everything(artifact.directory) for seed, artifact in sound.items()}
    kinds = dict.fromkeys(CORRUPT, 0)
    while sum(kinds.values()) < CORRUPTIONS:
        kind = chance.choice(list(CORRUPT))
        one, other = (sound[seed].directory for seed in chance.sample(sorted(sound), 2))
        CORRUPT[kind](one, other, chance)
        touched = [seed for seed, artifact in sound.items() if everything(artifact.directory) != pristine[seed]]
        assert one in [sound[seed].directory for seed in touched], kind
        kinds[kind] += 1
        for seed in touched:
            artifact = sound[seed]
            with pytest.raises(StoreError, match="cannot be used"):
                for name in ("tensors.safetensors", "rows.parquet", "notes/data.json"):
                    artifact.path(name)
            assert store.check("measure", artifact.key)[0] is None, kind
            again = store.run(MEASURE, None, {"seed": seed})
            assert again == artifact
            assert {**everything(again.directory), "manifest.json": b""} == {**pristine[seed], "manifest.json": b""}
            pristine[seed] = everything(again.directory)
    assert all(count > 5 for count in kinds.values())
    whole = kinds["the directory is deleted"]  # of which nothing is left to set aside
    twice = sum(count for kind, count in kinds.items() if "swapped" in kind)
    assert len(list((store.root / ".quarantine").iterdir())) == CORRUPTIONS - whole + twice


def everything(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def any_file(directory: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(path for path in directory.rglob("*") if path.is_file()))


def flip_a_bit(one: Path, other: Path, chance: random.Random) -> None:
    path = any_file(one, chance)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(one: Path, other: Path, chance: random.Random) -> None:
    path = any_file(one, chance)
    os.truncate(path, chance.randrange(path.stat().st_size))


def lengthen(one: Path, other: Path, chance: random.Random) -> None:
    with any_file(one, chance).open("ab") as file:
        file.write(chance.randbytes(chance.randint(1, 9)))


def overwrite(one: Path, other: Path, chance: random.Random) -> None:
    path = any_file(one, chance)
    content = path.read_bytes()
    first = chance.randrange(len(content))
    block = bytes(byte ^ 0x5A for byte in content[first : first + 16])
    path.write_bytes(content[:first] + block + content[first + len(block) :])


def swap(a: Path, b: Path) -> None:
    third = a.with_name("third")
    a.rename(third)
    b.rename(a)
    third.rename(b)


def swap_files(one: Path, other: Path, chance: random.Random) -> None:
    name = any_file(one, chance).relative_to(one)
    swap(one / name, other / name)


def edit_the_manifest(one: Path, other: Path, chance: random.Random) -> None:
    path = one / "manifest.json"
    manifest = json.loads(path.read_text())
    holder, name = chance.choice(list(leaves(manifest)))
    value = holder[name]
    holder[name] = value + 1 if isinstance(value, int | float) else f"{value}x"
    path.write_text(json_text(manifest), encoding="utf-8")


def leaves(value: Any):
    """Where every plain value is: what holds it, and under which name."""
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list):
            yield from leaves(item)
        else:
            yield value, name


CORRUPT: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "a bit is flipped": flip_a_bit,
    "a file is cut": truncate,
    "a file is longer": lengthen,
    "a block is overwritten": overwrite,
    "a file is deleted": lambda one, other, chance: any_file(one, chance).unlink(),
    "the directory is deleted": lambda one, other, chance: shutil.rmtree(one),
    "a file is swapped with another artifact's": swap_files,
    "directories are swapped": lambda one, other, chance: swap(one, other),
    "the manifest is edited": edit_the_manifest,
}


def test_corruptions_of_a_real_store_are_named_by_verify(tmp_path, capsys):
    """The command that a user runs, on what a sweep leaves: every artifact of it, one after the other."""
    chance = random.Random(11)
    one = [str(make_run(tmp_path / "run") / "checkpoint-3")]
    made = probe(values(tmp_path / "run", tmp_path / "store", checkpoints=one))
    root = made.run.store.root
    assert main(["store", "verify", "--artifacts", str(root)]) == 0
    assert "all sound" in capsys.readouterr().out
    names = made.run.store.names()
    for stage, key in names:
        flip_a_bit(root / stage / key, root, chance)
    assert main(["store", "verify", "--artifacts", str(root)]) == 1
    *named, last = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in named] == [f"{stage}/{key}" for stage, key in names]
    assert f"{len(names)} unsound" in last

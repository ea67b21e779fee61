"""Hostile files of every kind: each ends in a result or in one `ProbeError`, soon, and touches nothing else.

A part of them is tried with every run of the tests; `pytest -m attack` tries `INPUTS` others (the environment variable
ENTROPY_PROBE_FUZZ_INPUTS takes the place of that number).
"""

import logging
import os
import shutil
import warnings
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, Home, PrintedError, Target, link
from hypothesis import HealthCheck, given, settings
from watching import watched

from entropy_core.errors import ProbeError

INPUTS = int(os.environ.get("ENTROPY_PROBE_FUZZ_INPUTS", "5000"))
FEW = 24
SHARES = dict.fromkeys(TARGETS, 2) | {"configurations": 5, "prompt files": 4, "files of a model": 3}
SHARES |= {"archives": 1, "manifests and records": 1}
"""Of the inputs: those that are tried quickly have more."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def in_order(error: str) -> None:
    """One line, or a list: a line for each entry, set in, between what is listed and what to do."""
    first, *rest = error.split("\n")
    entries, last = rest[:-1], rest[-1:]
    assert all(line.isprintable() for line in (first, *rest)), ascii(error)
    assert all(entry.startswith("  ") for entry in entries), error
    assert all(line.startswith("Fix: ") for line in last), error
    assert len(error) < 5000


def check(target: Target, home: Home, files: dict[str, bytes], folder: Path) -> None:
    """Do it in a folder of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if target.beside:
        link(home.folder / target.beside, folder / target.beside)
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    with watched(folder.parent) as seen, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.act(folder)
        except (ProbeError, PrintedError) as error:
            in_order(str(error))
    assert seen.outside == []


def fuzz(name: str, home: Home, folder: Path, inputs: int, again: bool) -> None:
    target = TARGETS[name](home)

    @settings(
        max_examples=inputs,
        deadline=None,  # the watch ends what hangs
        database=None,
        derandomize=again,
        suppress_health_check=list(HealthCheck),
    )
    @given(files=target.files)
    def every_input(files: dict[str, bytes]) -> None:
        check(target, home, files, folder)

    every_input()


@pytest.mark.parametrize("name", TARGETS)
def test_a_hostile_file_ends_in_a_result_or_in_one_error(home, tmp_path, name):
    fuzz(name, home, tmp_path / "here", FEW, again=True)


@pytest.mark.chaos
@pytest.mark.attack(
    "a hostile file: configurations, prompts, checkpoints, adapters, indices, archives, manifests, records"
)
@pytest.mark.parametrize("name", TARGETS)
def test_thousands_of_hostile_files_do(home, tmp_path, name, record_property):
    inputs = max(1, INPUTS * SHARES[name] // sum(SHARES.values()))
    fuzz(name, home, tmp_path / "here", inputs, again=False)
    record_property("tries", inputs)

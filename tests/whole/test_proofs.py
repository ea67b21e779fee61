"""The pages of `make validate` and `make chaos`: written from what ran, and only when everything ran."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from attacks import in_place

PROOFS = """
import pytest

pytestmark = pytest.mark.validate


def test_that_holds(record):
    record("Sum", claim="One and one make two.", limit="1e-10", columns=("sum", "error"))
    record.row("1 + 1", 0.0)
    record.note("Nothing is missing.")


def test_that_does_not(record):
    record("Product", claim="Two and two make five.", limit="none", columns=("product", "value"))
    record.row("2 · 2", 4)
    assert record.rows == [], "four, not five"
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "validation.md").write_text("the page before")
    folder = tmp_path / "tests" / "validation"
    folder.mkdir(parents=True)
    (folder / "test_1.py").write_text(PROOFS)
    (folder / "test_2.py").write_text(PROOFS.replace("test_that_does_not", "test_after").replace("== []", "!= []"))
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["validate: a proof"]\n')
    return tmp_path


def run(repository: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit status, last words, and the page."""
    command = [sys.executable, "-m", "pytest", "-p", "proofs", "-p", "no:cacheprovider", "-m", "validate", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, (repository / "docs" / "validation.md").read_text()


@pytest.mark.parametrize("processes", [[], ["-n", "2", "--dist", "worksteal"]], ids=["one process", "two"])
def test_a_whole_run_writes_the_page_and_a_proof_that_fails_is_on_it(repository, processes):
    status, words, page = run(repository, "tests/validation", *processes)
    assert status == 1 and "docs/validation.md is written: 4 proofs, 1 failed ['Product']" in words
    assert "| outcome | 1 of 4 FAILED |" in page
    assert page.count("| Product | FAILED |") == 1 and page.count("| Product | holds |") == 1
    assert "| Sum | holds |" in page
    _, *sections = page.split("\n## ")
    assert [section.splitlines()[0] for section in sections] == ["Sum", "Product"] * 2
    assert "| sum | error |\n|---|---:|\n| 1 + 1 | 0 |\n\nNothing is missing." in sections[0]
    assert "**FAILED**" in sections[1] and "four, not five" in sections[1]
    assert "| 2 · 2 | 4 |" in sections[1]  # what was computed is shown all the same


@pytest.mark.parametrize(
    "part", [["tests/validation", "-k", "holds"], ["tests/validation/test_2.py"], ["tests/validation", "-x"]], ids=str
)
def test_a_part_of_the_proofs_writes_no_page(repository, part):
    _, words, page = run(repository, *part)
    assert page == "the page before"
    assert "docs/validation.md is left as it is: " in words and " did not run" in words


ATTACKS = """
import pytest


@pytest.mark.attack("a door is knocked at")
@pytest.mark.parametrize("times", [1, 2])
def test_a_door(times): ...


@pytest.mark.attack("a lock is picked")
def test_a_lock(record_property):
    record_property("tries", 50)


@pytest.mark.attack("a wall is run against")
def test_a_wall():
    assert not "standing"


@pytest.mark.attack("a gate that is not there")
def test_a_gate():
    pytest.skip("no gate")
"""


def test_a_row_for_each_attack_and_the_rest_of_the_page_stays(tmp_path):
    for folder in ("docs", "tests"):
        (tmp_path / folder).mkdir()
    page = tmp_path / "docs" / "chaos.md"
    before = "# What a kill costs\n\nNothing.\n"
    page.write_text(before)
    (tmp_path / "tests" / "test_attacks.py").write_text(ATTACKS)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\ntestpaths = ["tests"]\nmarkers = ["attack: one", "validate: a proof"]\n'
    )
    command = [sys.executable, "-m", "pytest", "-p", "attacks", "-p", "no:cacheprovider", "-m", "attack"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for part in (["-k", "door"], ["tests/test_attacks.py"], []):
        assert page.read_text() == before
        subprocess.run([*command, *part], cwd=tmp_path, env=environment, check=False, capture_output=True)
    rows = [line for line in page.read_text().splitlines() if line.startswith("| a ")]
    assert rows == [
        "| a door is knocked at | 2 | held |",
        "| a gate that is not there | 0 | not tried on this machine |",
        "| a lock is picked | 50 | held |",
        "| a wall is run against | 1 | **1 FAILED** |",
    ]
    assert page.read_text().startswith(before)


def test_a_section_takes_the_place_of_the_one_of_its_title():
    page = "# A\n\none\n\n# B\n\ntwo\n"
    assert in_place(page, "# A\n\nthree") == "# A\n\nthree\n\n# B\n\ntwo\n"
    assert in_place(page, "# C\n\nthree") == page + "\n# C\n\nthree\n"

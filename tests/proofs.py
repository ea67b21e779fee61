"""`make validate`: every proof of tests/validation records its table, and docs/validation.md is written from the run.

`make validate-runs` is the same for tests/against_runs and docs/against-runs.md, `make validate-smollm2` for
tests/against_smollm2 and docs/against-smollm2.md.

    def test_the_claim(record):
        record("Title", claim="One sentence.", limit="what must hold", columns=("quantity", "error"))
        record.row("H", power(error))     # before the assertion, so that a proof that fails shows its numbers
        assert error < 1e-10

A proof is a test, and the order of the page is that of the files, whichever processes ran them. The page appears only
when every proof of the folder ran: a part of them would be a page that claims less, or more, than it says.
"""

import ast
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Series(NamedTuple):
    """Proofs of one mark: their folder, and the page that is written when all of them ran."""

    folder: Path
    page: Path
    title: str
    command: str


SERIES = {
    "validate": Series(Path("tests/validation"), Path("docs/validation.md"), "Validation", "make validate"),
    "against_runs": Series(
        Path("tests/against_runs"), Path("docs/against-runs.md"), "Predictions against runs", "make validate-runs"
    ),
    "against_smollm2": Series(
        Path("tests/against_smollm2"),
        Path("docs/against-smollm2.md"),
        "Predictions against runs of SmolLM2",
        "make validate-smollm2",
    ),
}
LIBRARIES = ("entropy-probe", "torch", "transformers", "numpy", "scipy", "pyarrow", "safetensors")


@dataclass
class Proof:
    """What a proof says and shows, and what became of it."""

    name: str
    mark: str = "validate"
    title: str = ""
    claim: str = ""
    limit: str = ""
    columns: Sequence[str] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0

    def __call__(self, title: str, *, claim: str, limit: str, columns: Sequence[str]) -> None:
        """Say what is proved."""
        self.title, self.claim, self.limit, self.columns = title, claim, limit, columns

    def row(self, *cells: object) -> None:
        """Add a row to the table."""
        assert len(cells) == len(self.columns), (cells, self.columns)
        self.rows.append(tuple(text(cell) for cell in cells))

    def note(self, sentence: str) -> None:
        """Add a sentence below the table."""
        self.notes.append(sentence)

    @property
    def outcome(self) -> str:
        return "FAILED" if self.failure else "holds"

    def section(self) -> list[str]:
        """Of the page."""
        lines = [f"## {self.title or self.name}", "", self.claim, ""]
        lines += [f"Limit: {self.limit}. **{self.outcome}**, {self.seconds:.0f} s.", ""]
        if self.failure:
            lines += [f"> {self.failure}", ""]
        if self.rows:
            lines += table(self.columns, self.rows)
        return lines + [line for note in self.notes for line in (note, "")]


def text(cell: object) -> str:
    """A cell of a table; write floats with `power`, `percent` or a format of their own."""
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell).replace("|", "\\|")


def power(number: float) -> str:
    """An error, of which the size counts: 3.1e-12."""
    return f"{number:.1e}" if number else "0"


def percent(share: float) -> str:
    """94.87 %."""
    return f"{100 * share:.2f} %"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; the first column to the left, the others to the right where they hold numbers."""
    numbers = [all(re.fullmatch(r"[-+0-9.,e]*( %)?", row[i]) for row in rows) for i in range(1, len(columns))]
    rule = "|---" + "".join("|---:" if number else "|---" for number in numbers) + "|"
    return [f"| {' | '.join(map(text, columns))} |", rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def page(series: Series, proofs: Sequence[Proof], versions: dict[str, str]) -> str:
    """What docs/validation.md, or another page, says."""
    now = datetime.now(UTC)
    failed = [proof for proof in proofs if proof.failure]
    about = {
        "run": f"{now:%Y-%m-%d %H:%M} UTC",
        "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()}",
        "time": f"{sum(proof.seconds for proof in proofs) / 60:.1f} minutes, of all proofs together",
        "outcome": f"{len(failed)} of {len(proofs)} FAILED" if failed else f"all {len(proofs)} hold",
    }
    lines = [
        f"# {series.title}",
        "",
        f"Written by `{series.command}` from a run, which computed every number on this page.",
        "",
        *table(("", ""), [(name, value) for name, value in (about | versions).items()]),
        *table(("proof", "outcome", "seconds"), [(p.title or p.name, p.outcome, f"{p.seconds:.0f}") for p in proofs]),
    ]
    return "\n".join(lines + [line for proof in proofs for line in proof.section()]).rstrip() + "\n"


def proofs_in(folder: Path) -> list[str]:
    """Names of all tests of a folder, as its files have them and in their order."""
    return [
        f"{path.name}::{node.name}"
        for path in sorted(folder.glob("test_*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


@pytest.fixture(scope="session")
def demo_run() -> Path:
    """The checkpoints of the demo run, trained where they are missing."""
    command = [sys.executable, "-m", "entropy_core.demo", "--out", "artifacts/demo-run"]
    subprocess.run(command, cwd=ROOT, check=True)
    return ROOT / "artifacts/demo-run"


RUNNING = pytest.StashKey[Proof]()
FOUND = pytest.StashKey[dict[str, Proof]]()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Proof:
    """The proof that this test is."""
    return _proof(request.node)


def _proof(item: pytest.Item) -> Proof:
    mark = next((mark for mark in SERIES if item.get_closest_marker(mark)), "")
    return item.stash.setdefault(RUNNING, Proof(f"{item.path.name}::{item.name}", mark))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    proof = _proof(item)
    if proof.mark:
        proof.seconds += call.duration
        if not report.passed and not proof.failure:
            message = call.excinfo.exconly() if call.excinfo else report.outcome
            proof.failure = f"{report.outcome} in {report.when}: {' '.join(message.split())[:600]}"
        report.proof = asdict(proof)
    return report


def pytest_configure(config: pytest.Config) -> None:
    found = config.stash.setdefault(FOUND, {})

    class Collects:
        """Where reports arrive: from this process, or from those that run the tests for it."""

        @staticmethod
        def pytest_runtest_logreport(report: pytest.TestReport) -> None:
            if proof := getattr(report, "proof", None):
                found[proof["name"]] = Proof(**proof)

    config.pluginmanager.register(Collects())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Write the pages, or say why not."""
    for mark, series in SERIES.items():
        if found := {name: proof for name, proof in config.stash[FOUND].items() if proof.mark == mark}:
            _conclude(series, found, terminalreporter, config.rootpath)


def _conclude(series: Series, found: dict[str, Proof], terminal: pytest.TerminalReporter, root: Path) -> None:
    names = proofs_in(root / series.folder)
    proofs = sorted(found.values(), key=lambda proof: names.index(proof.name) if proof.name in names else len(names))
    missing = sorted(set(names) - set(found))
    if missing:
        terminal.write("\n".join(line for proof in proofs for line in proof.section()) + "\n")
        terminal.write_line(f"{series.page} is left as it is: {len(missing)} proofs did not run ({missing[0]}, …)")
        return
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}
    (root / series.page).write_text(page(series, proofs, versions), encoding="utf-8")
    failed = [proof.title for proof in proofs if proof.failure]
    terminal.write_line(f"{series.page} is written: {len(proofs)} proofs, {len(failed)} failed {failed or ''}".rstrip())

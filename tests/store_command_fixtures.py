"""A store with two runs, and what calls `entropy-probe store` on it."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pipeline_fixtures import Probe, make_run, probe, skip_figures, values

from flows.cli import main


def settings(folder: Path, **sections: Any) -> dict[str, Any]:
    return values(folder / "run", folder / "artifacts", checkpoints=[str(folder / "run" / "checkpoint-3")], **sections)


class TwoRuns(NamedTuple):
    """Of one checkpoint, in one store; the second at another temperature."""

    home: Path
    first: Probe
    second: Probe


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory) -> TwoRuns:
    folder = tmp_path_factory.mktemp("two-runs")
    make_run(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        skip_figures(patch)
        return TwoRuns(folder, probe(settings(folder)), probe(settings(folder, generation={"temperature": 0.5})))


@pytest.fixture
def store_command(capsys):
    """Call a command; its exit status and what it printed."""

    def call(root: Path, *arguments: Any) -> tuple[int, str]:
        status = main(["store", *map(str, arguments), "--artifacts", str(root)])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def kept(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts}

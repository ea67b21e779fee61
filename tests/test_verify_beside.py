"""`store verify` beside a sweep that goes on: what changes meanwhile is no damage."""

import json
from pathlib import Path

import pytest
from store_fixtures import DRAW, visible

from entropy_core.store import runs, vectors
from entropy_core.store.artifact import Artifact
from entropy_core.store.store import Stage, Store
from flows import store_commands


def with_vectors(out, execution, seed):
    out.path("a.txt").write_text(f"seed {seed}")
    out.path("vectors/x.txt").write_text("many numbers")
    return {}


VECTORS = Stage("with-vectors", with_vectors)


def record(store: Store, made: Artifact) -> None:
    folder = runs.folder(store.root, "a-run")
    folder.mkdir(parents=True)
    entry = {"checkpoint": "checkpoint-3", "inputs": {"scores": {"artifact": made.to_dict()}}}
    content = {"finished": "2026-11-26T00:00:00+00:00", "checkpoints": [entry], "report": made.to_dict()}
    (folder / runs.RECORD).write_text(json.dumps(content))


def test_a_run_that_is_recorded_meanwhile_lacks_nothing(store, monkeypatch, capsys):
    store.run(DRAW, None, {"seed": 1})
    listed = Store.names

    def names(self: Store) -> list[tuple[str, str]]:
        found = listed(self)
        if not runs.folder(store.root, "a-run").exists():
            record(store, store.run(DRAW, None, {"seed": 2}))
        return found

    monkeypatch.setattr(Store, "names", names)
    assert store_commands.verify(store) == 0
    assert "all sound" in capsys.readouterr().out


@pytest.mark.parametrize("happens", ["let go", "set aside"])
def test_what_goes_while_it_is_read_is_not_damaged(store, monkeypatch, capsys, happens):
    made = store.run(VECTORS, None, {"seed": 1})
    digest = store_commands.read_digest

    def while_it_is_read(path: Path) -> str:
        found = digest(path)
        if happens == "let go":
            vectors.drop(store, made)
        elif made.directory.exists():
            store.quarantine(made.stage, made.key, "a sweep found it damaged")
        return found

    monkeypatch.setattr(store_commands, "read_digest", while_it_is_read)
    assert store_commands.verify(store) == 0
    assert "all sound" in capsys.readouterr().out


def test_damage_is_found_all_the_same(store, capsys):
    made = store.run(VECTORS, None, {"seed": 1})
    (made.directory / "vectors" / "x.txt").unlink()
    before = visible(store)
    assert store_commands.verify(store) == 1
    assert f"with-vectors/{made.key}: x.txt is missing" in capsys.readouterr().out
    assert visible(store) == before

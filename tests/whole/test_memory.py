"""A stage that runs out of memory is run again with half the micro-batches, and nothing else changes."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import make_run, probe, skip_figures, values

from entropy_core.errors import MemoryShortageError
from entropy_core.execution import Execution
from entropy_core.pipeline.memory import run_within_memory
from entropy_core.sequences.processor import SequenceProcessor
from entropy_core.store.store import Stage, Store

TRIED: list[tuple[int, int, int]] = []
ROOM = 3


def hungry(out, execution, how):
    TRIED.append((execution.gen_batch_size, execution.tf_batch_size, execution.head_chunk_megabytes))
    out.json("half", "half.json")
    if execution.tf_batch_size > ROOM:
        if how == "torch":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if how == "python":
            raise MemoryError
        torch.empty(2**60)  # no machine has that
    if how == "never":
        torch.empty(2**60)
    if how == "broken":
        raise RuntimeError("shapes do not fit")
    return {"sum": 1}


HUNGRY = Stage("hungry", hungry)


@pytest.fixture(autouse=True)
def _reset():
    TRIED.clear()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.mark.parametrize("how", ["torch", "python", "allocator"])
def test_a_stage_is_tried_with_half_the_micro_batches_until_it_fits(store, caplog, how):
    execution = Execution(gen_batch_size=6, tf_batch_size=8, head_chunk_megabytes=100)
    made = run_within_memory(store, HUNGRY, execution, {"how": how})
    assert TRIED == [(6, 8, 100), (3, 4, 50), (1, 2, 25)]
    assert made.key == store.key(HUNGRY, {"how": how})
    assert made.manifest["execution"]["tf_batch_size"] == 2
    assert [path.name for path in (store.root / "hungry").iterdir()] == [made.key]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert warnings[1].startswith("hungry ran out of memory (")
    assert warnings[1].endswith("is run again with 1 sequences generated and 2 scored at a time")


def test_what_was_small_enough_is_remembered_for_the_stage_alone(store):
    execution = Execution(gen_batch_size=8, tf_batch_size=8)
    run_within_memory(store, HUNGRY, execution, {"how": "torch"})
    run_within_memory(store, HUNGRY, execution, {"how": "python"})
    assert [tf for _, tf, _ in TRIED] == [8, 4, 2, 2]
    run_within_memory(store, Stage("hungry-too", hungry), execution, {"how": "torch"})
    assert [tf for _, tf, _ in TRIED[4:]] == [8, 4, 2]


def test_a_sequence_that_does_not_fit_alone_is_an_error_that_says_so(store):
    with pytest.raises(MemoryShortageError, match=r"hungry runs out of memory even with one sequence.*Fix: free"):
        run_within_memory(store, HUNGRY, Execution(gen_batch_size=4, tf_batch_size=2), {"how": "never"})
    assert [tf for _, tf, _ in TRIED] == [2, 1, 1]
    assert list((store.root / "hungry").iterdir()) == []


def test_other_errors_pass_through_at_once(store):
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_within_memory(store, HUNGRY, Execution(tf_batch_size=2), {"how": "broken"})
    assert len(TRIED) == 1


def test_a_sweep_in_little_memory_has_the_same_results(tmp_path, monkeypatch):
    """Every pass over more than three sequences fails, as on a device that has no room for a fourth."""
    skip_figures(monkeypatch)
    one = [str(make_run(tmp_path / "run") / "checkpoint-3")]
    small: dict[str, Any] = {"checkpoints": one, "batch_config": {"E_total_sequences": 8, "B_U": 2, "G": 4}}
    usual = probe(values(tmp_path / "run", tmp_path / "usual", **small))
    refused = []
    for name, size in (("_generate", "gen_batch_size"), ("micro_batches", "tf_batch_size")):
        limit(monkeypatch, name, size, refused)
    little = probe(values(tmp_path / "run", tmp_path / "little", **small))
    assert set(refused) == {("gen_batch_size", 16), ("gen_batch_size", 8), ("gen_batch_size", 4)} | {
        ("tf_batch_size", 8),
        ("tf_batch_size", 4),
    }
    assert little.run.computed == usual.run.computed
    for stage in ("sample-e-batch", "sample-u-batch"):
        assert little.run.artifacts(stage) == usual.run.artifacts(stage), "the same sequences, to the bit"
    for row, same in zip(usual.rows, little.rows, strict=True):
        for name in ("H", "delta_h1", "se_given_u", "se_over_u", "delta_h", "delta_h_se", "ess"):
            assert same[name] == pytest.approx(row[name], rel=1e-4, abs=1e-9), name


def limit(monkeypatch: pytest.MonkeyPatch, name: str, size: str, refused: list[tuple[str, int]]) -> None:
    """Let no more than `ROOM` sequences pass at a time."""
    real = getattr(SequenceProcessor, name)

    def refuse(self, *args, **how):
        count = getattr(self.config, size)
        if count > ROOM:
            refused.append((size, count))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args, **how)

    monkeypatch.setattr(SequenceProcessor, name, refuse)

"""What a changed request costs, in stages executed: the new, and what depends on the whole batch; nothing else.

Raised batches and new step sizes are in test_pipeline.py, with the shards and the statistics that go with them.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import NAMES, Probe, make_run, probe, skip_figures, values

from entropy_core.store.artifact import Artifact

OF_THE_WHOLE = {
    "entropy-gradient",
    "first-order-u",
    "half-steps-u",
    "variance",
    "agreement",
    "report",
}  # and the noise of its first sequences


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extension")
    make_run(folder / "run")
    return folder


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch):
    skip_figures(monkeypatch)


def sweep(home: Path, artifacts: Path, **sections: Any) -> Probe:
    return probe(values(home / "run", artifacts, **sections))


def test_fewer_sequences_cost_only_what_depends_on_all_of_them(home, tmp_path):
    sweep(home, tmp_path, batch_config={"E_total_sequences": 24})
    fewer = sweep(home, tmp_path, batch_config={"E_total_sequences": 16})
    assert set(fewer.run.was_computed) == OF_THE_WHOLE | {"rescore-e-batch"}


def test_a_new_checkpoint_costs_only_itself(home, tmp_path):
    late = tmp_path / "run" / NAMES[1]
    shutil.copytree(home / "run" / NAMES[0], tmp_path / "run" / NAMES[0])
    one = sweep(tmp_path, tmp_path / "artifacts")
    shutil.copytree(home / "run" / NAMES[1], late)
    both = sweep(tmp_path, tmp_path / "artifacts")
    expected = dict(one.run.was_computed)
    assert expected.pop("load-prompts") == 1  # the pool is shared
    assert both.run.was_computed == expected
    assert [row["checkpoint"] for row in both.rows[:: len(both.rows) - 1]] == list(NAMES)


def test_another_confidence_level_costs_only_the_statistics(home, tmp_path):
    sweep(home, tmp_path)
    again = sweep(home, tmp_path, variance={"confidence_level": 0.8})
    assert again.run.was_computed == {"variance": len(NAMES), "report": 1}


def test_the_first_4096_of_8192_sequences_are_the_same_rows(home, tmp_path):
    """Sampled, scored, differentiated and moved: the shards are found, and hold the rows of the smaller batch."""
    one = {
        "checkpoints": [str(home / "run" / NAMES[0])],
        "policy": {"dtype": "float32"},
        "generation": {"max_new_tokens": 3, "gen_batch_size": 1024, "tf_batch_size": 1024},
        "execution": {"shard_size": 1024},
    }
    small = sweep(home, tmp_path, batch_config={"E_total_sequences": 4096}, **one)
    large = sweep(home, tmp_path, batch_config={"E_total_sequences": 8192}, **one)
    of_shards = ("sample-e-batch", "score-e-batch", "first-order-e", "importance")
    assert large.run.was_computed == dict.fromkeys(of_shards, 4) | dict.fromkeys(OF_THE_WHOLE, 1)
    for stage in of_shards:
        rows, more = rows_of(small.run.artifacts(stage)), rows_of(large.run.artifacts(stage))
        assert all(torch.equal(more[name][: len(rows[name])], rows[name]) for name in rows), stage
    tables = [shard.table("sequences.parquet") for shard in large.run.artifacts("sample-e-batch")]
    sequence_ids = [i for table in tables for i in table["sequence_id"].to_pylist()]
    assert sequence_ids == list(range(8192))
    assert {row["n_sequences"] for row in large.rows} == {8192}


def rows_of(shards: list[Artifact]) -> dict[str, torch.Tensor]:
    """Every tensor of the shards, one after the other; offsets as lengths."""
    files = [shard.tensors("tokens.safetensors") for shard in shards]
    return {
        name: torch.cat([file[name].diff() if "offsets" in name else file[name] for file in files]) for name in files[0]
    }

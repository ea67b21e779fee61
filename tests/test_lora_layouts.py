"""An adapter in the layouts of trainers that shard, against what their writers put into them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from trainer_layouts import weights_in, whole, written_lora

from entropy_core.checkpoints.adapter_files import load_adapter
from entropy_core.checkpoints.checkpoint import Checkpoint, read_checkpoint
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import checkpoint_digest
from entropy_core.policy.pretrained import load_policy

LAYOUTS = {
    "FSDP, full state dict": "fsdp_full/checkpoint-2",
    "FSDP, sharded state dict": "fsdp_sharded/checkpoint-2",
    "verl": "verl/global_step_2",
    "verl, its actor": "verl/global_step_2/actor",
}
FSDP1 = "fsdp1/global_step_2"
PREFIX = "base_model.model."


@pytest.fixture(scope="module", params=[2, 3])
def adapters(request, tmp_path_factory) -> Path:
    return written_lora(tmp_path_factory.mktemp("adapters"), request.param)


def of_name(found: Checkpoint) -> dict[str, object]:
    return {name: group.hyperparameters for group in found.optimizer.groups for name in group.names}


def test_an_adapter_and_its_moments_are_those_of_the_writer(adapters):
    truth = read_checkpoint(adapters / "plain" / "checkpoint-2")
    assert len(truth.parameter_shapes) == 8 and all("lora_" in name for name in truth.parameter_shapes)
    for layout, where in LAYOUTS.items():
        found = read_checkpoint(adapters / where)
        assert found.step == 2 and found.optimizer.step == truth.optimizer.step, layout
        assert list(found.parameter_shapes.items()) == list(truth.parameter_shapes.items())
        assert of_name(found) == of_name(truth) and found.optimizer.learning_rate == truth.optimizer.learning_rate
        assert found.layout.base == adapters / "base" and found.layout.shards is None
        for key in ("exp_avg", "exp_avg_sq"):
            for name, moment in truth.optimizer.moments[key].items():
                assert float(moment.abs().max()) > 0
                assert torch.equal(whole(found.optimizer.moments[key][name]), moment), (layout, name, key)


def test_every_factor_is_a_unit_of_fsdp1(adapters):
    found = read_checkpoint(adapters / FSDP1)
    truth = torch.load(adapters / "truth_fsdp1.pt", weights_only=True)
    of_adapter = {name.removeprefix(PREFIX): slot for name, slot in truth.items() if slot and "lora_" in name}
    assert len(of_adapter) == 8 and set(found.parameter_shapes) == set(of_adapter) == set(found.optimizer.step)
    for name, slot in of_adapter.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(whole(found.optimizer.moments[key][name]), slot[key]), (name, key)
    assert {group.weight_decay for group in of_name(found).values()} == {0.1}


def test_the_adapter_beside_the_shards_counts(adapters, tmp_path):
    directory = Path(shutil.copytree(adapters / "verl" / "global_step_2", tmp_path / "global_step_2"))
    before = checkpoint_digest(directory)
    file = directory / "actor" / "lora_adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert checkpoint_digest(directory) != before


def test_an_adapter_in_shards_alone_is_refused(adapters, tmp_path):
    directory = Path(shutil.copytree(adapters / "verl" / "global_step_2", tmp_path / "global_step_2"))
    assert any(".lora_A." in name for name in weights_in(directory / "actor"))
    shutil.rmtree(directory / "actor" / "lora_adapter")
    with pytest.raises(CheckpointError, match=r"adapter in its shards \(.*lora_A.* no adapter is saved beside.*merger"):
        read_checkpoint(directory, base_model=adapters / "base")


def in_shards_alone(original: Path, target: Path, **said: object) -> Path:
    """As verl saves an adapter since 2026: among its shards, with its rank and alpha in a file."""
    directory = Path(shutil.copytree(original, target / "global_step_2"))
    shutil.rmtree(directory / "actor" / "lora_adapter")
    meta = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | said
    (directory / "actor" / "lora_train_meta.json").write_text(json.dumps(meta))
    return directory


@pytest.mark.parametrize("where", ["verl/global_step_2", FSDP1])
def test_an_adapter_in_shards_is_the_one_beside_them(adapters, tmp_path, where):
    base, saved = adapters / "base", adapters / where / "actor" / "lora_adapter"
    directory = in_shards_alone(adapters / where, tmp_path)
    found, truth = read_checkpoint(directory, base_model=base), read_checkpoint(adapters / where)
    assert (
        found.layout.base == base and found.layout.shards is None and found.parameter_shapes == truth.parameter_shapes
    )
    assert found.optimizer.groups == truth.optimizer.groups and found.optimizer.step == truth.optimizer.step
    for key, of in truth.optimizer.moments.items():
        assert all(torch.equal(whole(found.optimizer.moments[key][name]), whole(moment)) for name, moment in of.items())
    assert any("lora_train_meta.json" in said for said in found.assumptions)
    tensors, theirs = load_adapter(directory / "actor"), load_adapter(saved)
    assert tensors.keys() == theirs.keys() and all(torch.equal(tensors[name], theirs[name]) for name in theirs)
    ours, other = (load_policy(of, "", "float64", "eager", "cpu", base) for of in (directory / "actor", saved))
    ids = torch.arange(2, 12)[None]
    assert torch.equal(ours.model(ids).logits, other.model(ids).logits)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"r": "3"}, "has r '3' and lora_alpha 6"),
        ({"lora_alpha": 0}, "has r 3 and lora_alpha 0"),
        ({"r": 4}, "other shapes than its base and its ranks give"),
    ],
)
def test_another_rank_or_alpha_is_refused(adapters, tmp_path, said, message):
    directory = in_shards_alone(adapters / "verl" / "global_step_2", tmp_path, **said)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(directory, base_model=adapters / "base")


def test_an_adapter_in_shards_needs_a_base_and_is_one_copy(adapters, tmp_path):
    directory = in_shards_alone(adapters / "verl" / "global_step_2", tmp_path)
    with pytest.raises(CheckpointError, match=r"its files name none.*policy\.base_model"):
        read_checkpoint(directory)
    with pytest.raises(CheckpointError, match="an adapter, whose weights are one copy"):
        read_checkpoint(directory, base_model=adapters / "base", masters=True)


def test_an_adapter_beside_shards_needs_its_base(adapters, tmp_path):
    directory = Path(shutil.copytree(adapters / "verl" / "global_step_2", tmp_path / "global_step_2"))
    config = directory / "actor" / "lora_adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(adapters / "base"), "Nobody/Base"))
    with pytest.raises(CheckpointError, match=r"base model of the adapter .*Nobody/Base.*policy\.base_model"):
        read_checkpoint(directory)
    assert read_checkpoint(directory, base_model=adapters / "base").step == 2

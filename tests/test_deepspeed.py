"""Checkpoints of DeepSpeed, of each stage and in the universal form, against what its own writer put into them."""

import json
import shutil

import pytest
import torch
from trainer_layouts import OTHERS, deepspeed, truth_of_deepspeed, weights_in, whole
from transformers import LlamaConfig, LlamaForCausalLM

from entropy_core.checkpoints.checkpoint import read_checkpoint
from entropy_core.checkpoints.layout import find_layout
from entropy_core.checkpoints.layouts.places import open_state
from entropy_core.checkpoints.optimizer_file import SavedMoments
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import checkpoint_digest, optimizer_digest

KINDS = ("zero2", "zero3", "zero3_groups", "universal2", "universal3")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_the_one_of_the_writer(tmp_path, kind):
    truth = truth_of_deepspeed(kind)
    found = read_checkpoint(deepspeed(kind, tmp_path))
    assert set(found.optimizer.moments["exp_avg"]) == set(truth) == set(found.parameter_shapes)
    weights = weights_in(found.layout.shards)
    for name, (moment, weight) in truth.items():
        assert torch.equal(weights[name], weight)
        if "3" in kind:
            assert torch.equal(whole(found.optimizer.moments["exp_avg"][name]), moment)
    decays = {n: g.hyperparameters.weight_decay for g in found.optimizer.groups for n in g.names}
    assert {name for name, decay in decays.items() if decay == 0} == {name for name in truth if "norm" in name}
    assert set(found.optimizer.step.values()) == {found.step} == {2}
    assert open_state(found.layout.optimizer).max_grad_norm() == 1.0


@pytest.mark.parametrize("stage", [2, 3])
def test_the_universal_form_is_the_same_state(tmp_path, stage):
    """Moments to the bit, and so its blocks; groups and steps."""
    ours = read_checkpoint(deepspeed(f"universal{stage}", tmp_path / "universal")).optimizer
    theirs = read_checkpoint(deepspeed(f"zero{stage}", tmp_path / "zero")).optimizer
    assert ours.groups == theirs.groups and ours.step == theirs.step and ours.learning_rate == theirs.learning_rate
    for key in ("exp_avg", "exp_avg_sq"):
        for name, moment in theirs.moments[key].items():
            assert torch.equal(whole(ours.moments[key][name]), whole(moment)), (name, key)
    moments = SavedMoments(tmp_path / "universal" / "checkpoint-2" / "global_step2_universal")
    name = "model.embed_tokens.weight"
    block = moments.read(ours.slot[name], "exp_avg", 100, 333)
    assert torch.equal(block, whole(theirs.moments["exp_avg"][name]).view(-1)[100:333].double())


def test_stage_three_cuts_a_large_group_into_several_tensors():
    """Above a billion parameters a rank, or as its configuration has it; groups keep their order."""
    saved = open_state(OTHERS / "zero3_groups" / "global_step2")
    numbers = [len(group["params"]) for group in saved._groups]
    assert numbers == [4, 1] and sum(numbers) == len(saved._shapes)


def test_the_stages_of_deepspeed_agree(tmp_path):
    """Of one training; its second stage sums the gradients in another order."""
    second, third = (read_checkpoint(deepspeed(f"zero{n}", tmp_path / str(n))).optimizer for n in (2, 3))
    for name in second.moments["exp_avg"]:
        for key in ("exp_avg", "exp_avg_sq"):
            a, b = (whole(state.moments[key][name]) for state in (second, third))
            assert float((a - b).norm()) < 1e-4 * float(b.norm()), (name, key)


def test_weights_that_transformers_opens_are_preferred_to_the_masters(tmp_path):
    directory = deepspeed("zero2", tmp_path)
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig.from_pretrained(directory)).save_pretrained(directory)
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    layout = find_layout(directory)
    assert layout.shards is None and layout.optimizer == directory / "global_step2"
    assert any("`policy.weights: master` takes that one" in said for said in read_checkpoint(directory).assumptions)
    of_masters = read_checkpoint(directory, masters=True)
    assert of_masters.layout.shards == directory / "global_step2" and of_masters.layout.model == directory
    assert not any("policy.weights" in said for said in of_masters.assumptions)


def test_a_conversion_beside_its_original_is_not_read_twice(tmp_path):
    """The folder of the training counts; a copy without it, or the converted folder alone, is the universal one."""
    directory = deepspeed("universal2", tmp_path)
    converted = directory / "global_step2_universal"
    assert find_layout(directory).optimizer == converted == find_layout(converted, directory).optimizer
    shutil.copytree(OTHERS / "zero2" / "global_step2", directory / "global_step2")
    assert find_layout(directory).optimizer == directory / "global_step2"


def test_every_file_of_a_universal_checkpoint_counts(tmp_path):
    directory = deepspeed("universal2", tmp_path)
    converted = directory / "global_step2_universal"
    files = [path for path in directory.rglob("*") if path.suffix == ".pt"]
    assert len(files) == 2 + 4 * 21
    for file in (
        files[0],
        converted / "zero" / "optimizer_state.pt",
        converted / "zero" / "lm_head.weight" / "fp32.pt",
    ):
        before = optimizer_digest(converted), checkpoint_digest(directory)
        file.write_bytes(file.read_bytes() + b" ")
        after = optimizer_digest(converted), checkpoint_digest(directory)
        assert before[0] != after[0] and before[1] != after[1], file


def test_a_parameter_that_never_had_a_gradient_does_not_move(tmp_path):
    directory = deepspeed("universal2", tmp_path)
    folder = directory / "global_step2_universal" / "zero" / "lm_head.weight"
    for name in ("exp_avg", "exp_avg_sq", "step"):
        (folder / f"{name}.pt").unlink()
    found = read_checkpoint(directory)
    assert found.optimizer.unmoved == ("lm_head.weight",) and "lm_head.weight" in weights_in(found.layout.shards)
    (folder / "fp32.pt").unlink()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: there is no fp32\.pt"):
        read_checkpoint(directory)

"""Every layout of a trainer's state holds what its own writer put into it, to the bit, and gives the same next step."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixtures import edit_optimizer, make_model, train, write
from pipeline_fixtures import gathered, make_run, probe, skip_figures, trainer_groups, values
from safetensors.torch import load_file
from trainer_layouts import OTHERS, describe, weights_in, whole, written

from entropy_core.checkpoints.archives import read_archive
from entropy_core.checkpoints.checkpoint import read_checkpoint
from entropy_core.checkpoints.layout import find_layout
from entropy_core.checkpoints.layouts.places import find_places
from entropy_core.checkpoints.optimizer_file import SavedMoments, load_optimizer
from entropy_core.checkpoints.pieces import Piece, Quantised, Scattered, in_one_piece
from entropy_core.config.read import parse_config
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import find_checkpoints
from entropy_core.numerics.adamw import AdamState, NextStep
from entropy_core.pipeline.plan import plan
from entropy_core.pipeline.preflight import preflight
from entropy_core.store.store import Store

LAYOUTS = {
    "the Trainer": "plain/checkpoint-2",
    "FSDP, full state dict": "fsdp_full",
    "accelerate's save_state": "accelerate",
    "FSDP, sharded state dict": "fsdp_sharded",
    "verl": "verl/global_step_2",
    "verl, its actor": "verl/global_step_2/actor",
    "SkyRL": "skyrl/global_step_2",
    "prime-rl": "prime_rl/step_2",
    "NeMo-RL": "nemo_rl/step_2",
    "torchtitan": "titan/step-2",
}
OF_FSDP1 = {"DTensor": "fsdp1", "ShardedTensor": "sharded_tensors"}


@pytest.fixture(scope="session")
def trainers(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("trainers"))


def checkpoint_of(trainers: Path, where: str) -> Any:
    """Its configuration is the plain checkpoint's, and said where none lies beside it."""
    return read_checkpoint(trainers / where, base_model=trainers / "plain" / "checkpoint-2")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_steps_and_groups_are_those_of_the_writer(trainers, layout):
    found, truth = checkpoint_of(trainers, LAYOUTS[layout]), read_checkpoint(trainers / LAYOUTS["the Trainer"])
    assert found.step == truth.step == 2
    ours, theirs = found.optimizer, truth.optimizer
    assert list(found.parameter_shapes.items()) == list(truth.parameter_shapes.items())
    assert ours.step == theirs.step and ours.learning_rate == theirs.learning_rate
    for name in theirs.moments["exp_avg"]:
        for key in ("exp_avg", "exp_avg_sq"):
            moment = ours.moments[key][name]
            assert moment.dtype == torch.float32 and torch.equal(whole(moment), theirs.moments[key][name]), name
    of_name = [{n: g.hyperparameters for g in state.groups for n in g.names} for state in (ours, theirs)]
    assert of_name[0] == of_name[1] and len({g.weight_decay for g in of_name[0].values()}) == 2
    moments = list(theirs.moments["exp_avg"].values())  # the comparison can fail: no two of one shape are the same
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(moments) for b in moments[:i])


@pytest.mark.parametrize("layout", [name for name, where in LAYOUTS.items() if where[:5] != "plain"])
def test_weights_in_shards_are_those_of_the_writer(trainers, layout):
    directory = trainers / LAYOUTS[layout]
    found = find_layout(directory, trainers / "plain" / "checkpoint-2")
    assert found.shards is not None
    weights, truth = weights_in(found.shards), load_file(trainers / "plain" / "checkpoint-2" / "model.safetensors")
    assert weights.keys() - {"lm_head.weight"} == truth.keys() - {"lm_head.weight"}
    head = truth.get("lm_head.weight", truth["model.embed_tokens.weight"])  # of tied embeddings one copy is saved
    assert all(torch.equal(tensor, truth.get(name, head)) for name, tensor in weights.items())


@pytest.mark.parametrize("kind", OF_FSDP1)
def test_flat_parameters_of_fsdp1_are_cut_where_its_units_are(trainers, kind):
    name = OF_FSDP1[kind]
    directory = trainers / name / "global_step_2"
    truth = torch.load(trainers / f"truth_{name}.pt", weights_only=True)
    saved = load_optimizer(find_places(directory).optimizer)
    assert saved.slots.keys() == truth.keys()
    for parameter, slot in truth.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(whole(saved.slots[parameter][key]), slot[key]), (parameter, key)
        assert saved.slots[parameter]["step"] == slot["step"]
    weights, of_weights = weights_in(directory / "actor"), torch.load(trainers / f"weights_{name}.pt")
    assert weights.keys() == of_weights.keys()
    assert all(torch.equal(weights[one], of_weights[one]) for one in of_weights)
    found = checkpoint_of(trainers, f"{name}/global_step_2")
    assert found.step == 2 and set(found.optimizer.moments["exp_avg"]) == set(truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_next_step_is_the_one_that_torch_takes(trainers, layout):
    """In float64, from the float32 state: AdamW of torch, given the same gradient, against lr·v block by block."""
    directory = trainers / LAYOUTS[layout]
    found = checkpoint_of(trainers, LAYOUTS[layout])
    weights = load_file(trainers / "plain" / "checkpoint-2" / "model.safetensors")
    moments = SavedMoments(found.layout.optimizer)
    generator = torch.Generator().manual_seed(1)
    of_name = {name: group.hyperparameters for group in found.optimizer.groups for name in group.names}
    for name, of_group in of_name.items():
        theta = weights[name].double()
        gradient = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        parameter = torch.nn.Parameter(theta.clone())
        optimizer = torch.optim.AdamW(
            [parameter],
            lr=found.optimizer.learning_rate,
            betas=(of_group.beta1, of_group.beta2),
            eps=of_group.eps,
            weight_decay=of_group.weight_decay,
        )
        optimizer.state[parameter] = {
            "step": torch.tensor(float(found.optimizer.step[name])),
            "exp_avg": whole(found.optimizer.moments["exp_avg"][name]).double(),
            "exp_avg_sq": whole(found.optimizer.moments["exp_avg_sq"][name]).double(),
        }
        parameter.grad = gradient
        optimizer.step()
        moved = []
        for start in range(0, theta.numel(), 100):  # blocks begin and end within shards and across them
            stop = min(start + 100, theta.numel())
            slot, steps = found.optimizer.slot[name], found.optimizer.step[name]
            state = AdamState(steps, *(moments.read(slot, key, start, stop) for key in ("exp_avg", "exp_avg_sq")))
            step = NextStep(gradient.view(-1)[start:stop], theta.view(-1)[start:stop], state, of_group)
            moved.append(found.optimizer.learning_rate * step.direction)
        change = (parameter.detach() - theta).view(-1)
        torch.testing.assert_close(torch.cat(moved), change, rtol=1e-9, atol=1e-15)
    assert directory.exists()


def test_a_run_directory_stands_for_its_checkpoints_by_their_numbers(tmp_path):
    for name in ("global_step_100", "global_step_20"):
        (tmp_path / "verl" / name / "actor").mkdir(parents=True)
    (tmp_path / "titan" / "step-5").mkdir(parents=True)
    (tmp_path / "nemo" / "step_7").mkdir(parents=True)
    (tmp_path / "trl" / "checkpoint-3" / "global_step3").mkdir(parents=True)  # of DeepSpeed: a part of a checkpoint
    runs = [str(tmp_path / name) for name in ("verl", "titan", "nemo", "trl")]
    assert [path.name for path in find_checkpoints(runs)] == [
        "checkpoint-3", "step-5", "step_7", "global_step_20", "global_step_100",
    ]  # fmt: skip
    actors = find_checkpoints([str(tmp_path / "verl" / "*" / "actor")])
    assert [path.parent.name for path in actors] == ["global_step_20", "global_step_100"]


def test_a_trainer_with_one_copy_of_its_weights_has_no_masters(sound):
    with pytest.raises(CheckpointError, match=r"policy\.weights is master, and .* has no weights in shards"):
        read_checkpoint(sound, masters=True)


def test_eight_bit_moments_of_bitsandbytes(tmp_path):
    path = tmp_path / "optimizer.pt"
    shutil.copy(OTHERS / "bitsandbytes_adamw8bit.pt", path)
    raw = torch.load(path, weights_only=True)["state"]
    saved = load_optimizer(path)
    of_codes, plain = saved.slots[0], saved.slots[1]
    inner = raw[0]["__bnb_optimizer_quant_state__"]
    for key, place in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        blocks = inner[f"qmap{place}"][inner[f"state{place}"].long()].view(-1, 256) * inner[f"absmax{place}"][:, None]
        assert torch.equal(whole(of_codes[key]), blocks.view(96, 64))
        assert torch.equal(of_codes[key].flat(250, 700), blocks.view(-1)[250:700])
        assert torch.equal(whole(plain[key]), raw[1]["__bnb_optimizer_quant_state__"][f"state{place}"])
    assert of_codes["step"] == 7 and saved.groups[0]["amsgrad"] is False
    before = {"state": {k: slot | slot.pop("__bnb_optimizer_quant_state__") for k, slot in raw.items()}}  # 0.49.1
    (tmp_path / "before").mkdir()
    older = tmp_path / "before" / "optimizer.pt"
    torch.save(before | {"param_groups": torch.load(path, weights_only=True)["param_groups"]}, older)
    assert torch.equal(whole(load_optimizer(older).slots[0]["exp_avg"]), whole(of_codes["exp_avg"]))


def test_the_fused_adam_of_apex_counts_its_steps_in_its_groups(sound):
    plain = read_checkpoint(sound).optimizer

    def as_apex(saved):
        for slot in saved["state"].values():
            step = int(slot.pop("step"))
        kept = {"lr", "betas", "eps", "weight_decay", "params"}
        groups = [{key: group[key] for key in kept} | {"bias_correction": True} for group in saved["param_groups"]]
        saved["param_groups"] = [group | {"step": step} for group in groups]

    edit_optimizer(sound, as_apex)
    found = read_checkpoint(sound).optimizer
    assert found.step == plain.step and found.groups == plain.groups
    edit_optimizer(sound, lambda saved: saved["param_groups"][1].update(grad_averaging=True))
    with pytest.raises(CheckpointError, match="no amsgrad in param group 1"):
        read_checkpoint(sound)
    edit_optimizer(sound, lambda saved: saved["param_groups"][0].update(bias_correction=False))
    with pytest.raises(CheckpointError, match="an Adam without bias correction"):
        read_checkpoint(sound)


def test_eight_bit_moments_say_nothing_of_narrow_weights(tmp_path):
    """bitsandbytes has moments in codes or in float32 whatever the weights are: a step in bfloat16 is refused."""
    model = make_model().bfloat16()
    optimizer = torch.optim.AdamW(trainer_groups(model), lr=1e-3)
    train(model, optimizer)
    directory = write(tmp_path / "c", model, optimizer)
    assert read_checkpoint(directory).narrow

    def as_bitsandbytes(saved):
        for slot in saved["state"].values():
            slot["state1"], slot["state2"] = slot.pop("exp_avg").float(), slot.pop("exp_avg_sq").float()
        for group in saved["param_groups"]:
            del group["amsgrad"], group["fused"]

    edit_optimizer(directory, as_bitsandbytes)
    with pytest.raises(CheckpointError, match="kept in BF16, and how bitsandbytes' AdamW rounds its step"):
        read_checkpoint(directory)


def test_codes_with_too_few_scales_are_refused():
    with pytest.raises(ValueError, match="codes with"):
        Quantised(torch.zeros(300, dtype=torch.uint8), torch.zeros(256), torch.zeros(1))


def test_a_tensor_in_boxes_is_put_together(tmp_path):
    """Cut along both axes, as with tensor parallelism, and stored with the strides of a transposed matrix."""
    matrix = torch.arange(35.0).reshape(5, 7)
    boxes = [((0, 0), matrix[:3, :4]), ((0, 4), matrix[:3, 4:]), ((3, 0), matrix[3:, :4]), ((3, 4), matrix[3:, 4:])]
    pieces = []
    for number, (begins, box) in enumerate(boxes):
        torch.save(box.t().contiguous().t(), tmp_path / f"{number}.pt")
        stored = read_archive(tmp_path / f"{number}.pt")
        pieces.append(Piece(begins, stored.shape, lambda stored=stored: stored))
    scattered = Scattered((5, 7), torch.float32, pieces)
    assert torch.equal(scattered.whole(), matrix)
    for start, stop in ((0, 35), (6, 8), (3, 30), (34, 35)):
        assert torch.equal(scattered.flat(start, stop), matrix.view(-1)[start:stop])
    assert torch.equal(in_one_piece(read_archive(tmp_path / "0.pt")).whole(), matrix[:3, :4])
    with pytest.raises(ValueError, match="overlap"):
        Scattered((5, 7), torch.float32, [*pieces[:3], pieces[3]._replace(begins=(3, 3))])
    with pytest.raises(ValueError, match="numbers of 35"):
        Scattered((5, 7), torch.float32, pieces[:3])
    with pytest.raises(ValueError, match="outside"):
        Scattered((5, 7), torch.float32, [*pieces[:3], pieces[3]._replace(begins=(3, 5))])


def test_a_model_without_a_config_is_described_by_the_base(trainers, tmp_path):
    with pytest.raises(CheckpointError, match=r"without a config\.json.*policy\.base_model"):
        read_checkpoint(trainers / "titan" / "step-2")
    actor = tmp_path / "global_step_4" / "actor"
    shutil.copytree(trainers / "verl" / "global_step_2" / "actor", actor)
    describe(actor, trainers / "plain" / "checkpoint-2", "huggingface")
    found = read_checkpoint(tmp_path / "global_step_4")
    assert found.layout.model == actor / "huggingface" and found.step == 4 and found.name == "global_step_4"


def test_a_sweep_from_shards_is_the_plain_one_and_nothing_of_it_runs_twice(tmp_path, monkeypatch):
    """What was gathered gives the numbers of the plain checkpoint; the weights in one file are an artifact."""
    skip_figures(monkeypatch)
    run = make_run(tmp_path / "run")
    gathered(Path(shutil.copytree(run / "checkpoint-3", tmp_path / "fsdp" / "checkpoint-3")))
    plain = probe(values(run, tmp_path / "a", checkpoints=[str(run / "checkpoint-3")]))
    config = values(run, tmp_path / "b", checkpoints=[str(tmp_path / "fsdp" / "checkpoint-3")])
    found = probe(config)
    numbers = ("H", "delta_h1", "delta_h", "next_update_low", "next_update_high")
    assert [[row[n] for n in numbers] for row in found.rows] == [[row[n] for n in numbers] for row in plain.rows]
    assert found.run.was_computed["load-weights"] == 1 and "load-weights" not in plain.run.was_computed
    (loaded,) = found.run.artifacts("load-weights")
    assert loaded.to_dict() in found.run.artifacts("sample-e-batch")[0].manifest["upstream"]
    assert probe(config).run.was_computed == {}
    sized = {
        (artifact.stage, name)
        for artifact in found.run.store.ls()
        for name, entry in artifact.manifest["files"].items()
        if any(tensor.endswith(".weight") for tensor in entry.get("tensors", ()))
    }
    assert {"load-weights", "compute-update", "entropy-gradient"} <= {stage for stage, _ in sized}
    assert all(name.startswith("vectors/") for _, name in sized), "all that is of the size of the policy is of one kind"


def test_the_weights_of_shards_go_with_the_vectors_and_are_made_anew_where_they_are_needed(tmp_path, monkeypatch):
    skip_figures(monkeypatch)
    gathered(make_run(tmp_path / "run") / "checkpoint-3")

    def swept(**sections: object) -> dict[str, int]:
        asked = values(
            tmp_path / "run",
            tmp_path / "store",
            checkpoints=[str(tmp_path / "run" / "checkpoint-3")],
            execution={"keep_vectors": False},
            **sections,
        )
        steps = plan(parse_config(asked), preflight(parse_config(asked)), Store(tmp_path / "store"))
        ran = probe(asked).run.was_computed
        assert not list((tmp_path / "store").rglob("vectors/*"))
        assert {step.stage for step in steps if not step.cached} == set(ran), "the plan says so"
        return ran

    assert swept()["load-weights"] == 1 and swept() == {}
    again = swept(importance={"etas": [0, 1, 2]})
    assert set(again) == {"load-weights", "compute-update", "importance", "variance", "report"}
    assert set(swept(variance={"confidence_level": 0.9})) == {"variance", "report"}


def test_a_sweep_from_shards_needs_its_optimizer_whole(tmp_path):
    gathered(make_run(tmp_path / "run") / "checkpoint-3")
    config = values(tmp_path / "run", tmp_path / "store", checkpoints=[str(tmp_path / "run" / "checkpoint-3")])
    (tmp_path / "run" / "checkpoint-3" / "optimizer.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"optimizer\.bin is not a complete archive"):
        probe(config)


def test_the_plan_of_a_sweep_from_shards(tmp_path):
    run = make_run(tmp_path / "run")
    gathered(run / "checkpoint-3")
    config = parse_config(values(run, tmp_path / "store", checkpoints=[str(run / "checkpoint-3")]))
    steps = plan(config, preflight(config), Store(config.store_root))
    assert "load-weights" in {step.stage for step in steps} and all(not step.cached for step in steps)


def test_three_ranks_with_shards_of_several_sizes_and_tied_embeddings(tmp_path):
    trainers = written(tmp_path / "trainers", 3, tied=True)
    for layout, where in LAYOUTS.items():
        test_moments_steps_and_groups_are_those_of_the_writer(trainers, layout)
        if where[:5] != "plain":
            test_weights_in_shards_are_those_of_the_writer(trainers, layout)
    for kind in OF_FSDP1:
        test_flat_parameters_of_fsdp1_are_cut_where_its_units_are(trainers, kind)

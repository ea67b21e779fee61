"""LoRA: the policy is PEFT's own model, and the step is that of torch's AdamW in what the adapter trains."""

import copy
import json
import logging
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import gpt2, llama, policy_of, random_direction
from lora_fixtures import make_base, make_lora, save_adapter, trained, with_adapter, write_json
from pipeline_fixtures import LEARNING_RATE, Probe, parts_of, probe, skip_figures, trainer_groups, values, whole
from safetensors.torch import load_file, save_file
from test_policy import TAU, five_point, plain, rows
from transformers import AutoModelForCausalLM

from entropy_core.checkpoints.adapter_files import PEFT_PREFIX
from entropy_core.checkpoints.adapters import check_adapter, fill_adapter, insert_adapter
from entropy_core.checkpoints.checkpoint import read_checkpoint
from entropy_core.checkpoints.optimizer_step import OptimizerStep
from entropy_core.config.read import parse_config
from entropy_core.errors import CheckpointError, ConfigError
from entropy_core.numerics.vectors import in_blocks
from entropy_core.pipeline.preflight import preflight
from entropy_core.policy import moves
from entropy_core.policy.derivatives import token_derivatives
from entropy_core.policy.model import Coefficients

ADAPTERS: dict[str, tuple[Any, dict[str, Any]]] = {  # the base, and what differs from plain LoRA on some layers
    "plain": (gpt2, {"target_modules": ["c_attn"]}),
    "all layers": (llama, {"target_modules": "all-linear", "fan_in_fan_out": False}),
    "patterns": (
        gpt2,
        {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 1}, "alpha_pattern": {"c_fc": 5}},
    ),
    "rslora": (gpt2, {"target_modules": ["c_attn"], "use_rslora": True}),
    "biases": (gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "bias of the factor": (gpt2, {"target_modules": ["c_attn"], "lora_bias": True}),
    "norms and the position table": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe"]}),
    "embedding and head": (
        lambda: gpt2(tie_word_embeddings=False),
        {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
    ),
    "LoRA on the head": (lambda: gpt2(tie_word_embeddings=False), {"target_modules": ["c_attn", "lm_head"]}),
    "LoRA on the embedding": (gpt2, {"target_modules": ["c_attn", "wte"]}),
    "embedding, the tied head frozen": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
    "head, the tied embedding frozen": (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "embedding, tied to the head": (
        gpt2,
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "ensure_weight_tying": True},
    ),
    "some tokens": (
        lambda: gpt2(tie_word_embeddings=False),
        {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [0, 2]}},
    ),
    "some tokens, tied": (gpt2, {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [0, 2]}}),
}
every_adapter = pytest.mark.parametrize("name", ADAPTERS)


def adapter_of(name: str, directory: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """PEFT's own model with weights that are all not zero, saved; and a base that was given this adapter by us."""
    make, lora = ADAPTERS[name]
    expected = with_adapter(make(), lora_dropout=0.5, **lora).double()
    with torch.no_grad():
        for p in trained(expected).values():
            p += 0.3 * torch.randn_like(p)
    save_adapter(expected, directory)
    stored = load_file(directory / "adapter_model.safetensors")
    save_file({n: t.contiguous() for n, t in stored.items()}, directory / "adapter_model.safetensors")
    model = make()
    insert_adapter(model, directory)
    fill_adapter(model, directory)
    return expected.eval(), model


@every_adapter
def test_the_policy_is_that_of_peft(name: str, tmp_path: Path):
    expected, model = adapter_of(name, tmp_path)
    policy = policy_of(model, head_chunk_rows=3)
    expected.set_attn_implementation("sdpa")  # as the policy; the softmax of eager attention is float32
    with torch.no_grad():
        torch.testing.assert_close(tuple(policy.statistics(rows(), TAU)), plain(expected), rtol=1e-9, atol=1e-9)
        off = plain(ADAPTERS[name][0]())
    assert (policy.statistics(rows(), TAU).logprobs_K - off[0]).abs().max() > 0.01  # the adapter is on
    assert list(policy.named_parameters()) == [n.removeprefix(PEFT_PREFIX) for n in trained(expected)]
    for parameter, other in zip(policy.named_parameters().values(), trained(expected).values(), strict=True):
        assert torch.equal(parameter, other)


@every_adapter
def test_the_adapter_of_a_model_without_storage_is_the_same(name: str, tmp_path: Path):
    _, model = adapter_of(name, tmp_path)
    with torch.device("meta"):
        empty = ADAPTERS[name][0]()
    insert_adapter(empty, tmp_path)
    check_adapter(empty, tmp_path)
    assert [(n, p.shape) for n, p in trained(empty).items()] == [(n, p.shape) for n, p in trained(model).items()]
    assert {p.device.type for p in empty.parameters()} == {"meta"}


@every_adapter
def test_derivatives_along_the_adapter(name: str, tmp_path: Path):
    """Forward mode against differences and against backward mode, one parameter at a time; the model stays whole."""
    _, model = adapter_of(name, tmp_path)
    policy = policy_of(model, head_chunk_rows=3)
    v = random_direction(policy)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step, tolerance = (1e-3, 1e-8) if ADAPTERS[name][0] is not llama else (0.01, 1e-3)  # its norms are in float32
    found = token_derivatives(policy, rows(), v, TAU)
    torch.testing.assert_close(tuple(found[2:]), five_point(policy, v, step), rtol=tolerance, atol=tolerance)
    assert min(column_K.abs().max() for column_K in found[2:]) > 0.003

    weights = Coefficients(*torch.randn(2, 7, dtype=torch.float64))
    gradients = policy.new_accumulator()
    assert gradients.keys() == v.keys()  # nothing is kept for what is frozen
    policy.add_gradients(rows(), [weights], TAU, [gradients])
    for part in v:
        along = token_derivatives(policy, rows(), {part: v[part]}, TAU)
        forward = (weights.logprob_K @ along.dlogprobs_K + weights.entropy_K @ along.dentropies_K).item()
        assert forward == pytest.approx(float((gradients[part] * v[part]).sum()), rel=1e-5, abs=1e-9), part

    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert all(isinstance(p, torch.nn.Parameter) and p.grad is None for p in after.values())


def test_what_moves_is_the_adapter_and_what_rounds_is_everything(tmp_path: Path):
    _, model = adapter_of("some tokens, tied", tmp_path)
    policy = policy_of(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    v = random_direction(policy)
    with moves.moved(policy, v, 0.5):
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n] + 0.5 * v[n] if n in v else before[n])
    with moves.jittered(policy, seed=3):
        assert all((p != before[n]).all() for n, p in model.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# --- checkpoints -----------------------------------------------------------------------------------------------------

MIXED = {"modules_to_save": ["ln_f", "wpe"], "rank_pattern": {"c_fc": 1}}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """One base; the same adapter in both layouts, and one that trains norms and positions as well."""
    home = tmp_path_factory.mktemp("home")
    base = make_base(home / "base")
    make_lora(home / "run" / "checkpoint-3", base, **MIXED)
    make_lora(home / "plain" / "checkpoint-3", base)
    make_lora(home / "folder" / "step-3", base, layout="folder")
    return home


@pytest.fixture
def home(original, tmp_path, monkeypatch) -> Path:
    skip_figures(monkeypatch)

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return original


def config_of(home: Path, artifacts: Path, checkpoint: str, **sections: Any) -> dict[str, Any]:
    (artifacts.parent / "reward.py").write_text(
        "def share(completions, **_):\n    return [sum(c in '01234' for c in text) / 4 for text in completions]\n"
    )
    reward = {"reward": f"{artifacts.parent / 'reward.py'}:share"}
    own: dict[str, Any] = {"checkpoints": [str(home / checkpoint)], "update": reward}
    for name, section in sections.items():
        own[name] = own[name] | section if name in own and isinstance(section, dict) else section
    return values(home, artifacts, **own)


def torch_step(checkpoint: Path, base: Path, gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The step per unit of learning rate that torch's AdamW takes on PEFT's model, from the saved state, in float64."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), checkpoint, is_trainable=True
    )
    optimizer = torch.optim.AdamW(trainer_groups(model))
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    named = trained(model)
    before = {name: p.detach().clone() for name, p in named.items()}
    for name, p in named.items():
        p.grad = gradient[name.removeprefix(PEFT_PREFIX)].clone()
    torch.nn.utils.clip_grad_norm_(named.values(), 0.05)
    optimizer.step()
    lr = optimizer.param_groups[0]["lr"]
    return {name.removeprefix(PEFT_PREFIX): (p.detach() - before[name]) / lr for name, p in named.items()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpoint", ["run/checkpoint-3", "plain/checkpoint-3"])
def test_a_sweep_over_an_adapter(home: Path, tmp_path: Path, checkpoint: str):
    done = probe(config_of(home, tmp_path / "artifacts", checkpoint, update={"max_grad_norm": 0.05}))
    for row in done.rows:
        assert row["gradient_check"] <= 1e-10
        assert row["clip_factor"] < 1
        if row["eta"] and row["normalization"] == "per_sequence":
            assert row["delta_h1"] != 0 and abs(row["paired_difference"]) < abs(row["delta_h1"])

    (update,) = done.run.artifacts("compute-update")
    (loaded,) = done.run.artifacts("load-checkpoint")
    gradient = dict(update.vector("gradient"))
    expected = torch_step(home / checkpoint, home / "base", gradient)
    direction = dict(update.vector("direction"))
    assert direction.keys() == expected.keys() and any("lora_A" in name for name in direction)
    for name, v in direction.items():
        torch.testing.assert_close(v, expected[name], rtol=1e-12, atol=1e-12 * float(expected[name].abs().max()))
    assert loaded.summary["matched"] == loaded.summary["trained"] == len(direction)
    assert all(part.keys() == direction.keys() for part in parts_of(update, done.run).values())


def test_the_other_layout_gives_the_same_names(home: Path, caplog):
    """The optimizer's one group is in an order of its own, which only the file of names tells."""
    with caplog.at_level(logging.INFO, "entropy_probe"):
        checkpoint = read_checkpoint(home / "folder" / "step-3")
    assert "matched by name for 4 of 4 trained parameters" in caplog.text
    assert (checkpoint.step, checkpoint.name) == (3, "step-3")
    assert checkpoint.assumptions == ()
    slots = torch.load(home / "folder" / "step-3" / "optimizer.pt", weights_only=True)["state"]
    names = list(checkpoint.parameter_shapes)
    assert list(checkpoint.optimizer.groups[0].names) == list(reversed(names))
    for index, name in enumerate(reversed(names)):
        assert torch.equal(checkpoint.optimizer.moments["exp_avg"][name], slots[index]["exp_avg"])


def test_the_reference_of_a_kl_term_is_the_base_without_its_adapter(home: Path, tmp_path: Path):
    plain = {"update": {"kl_beta": 0.3}}
    done = probe(config_of(home, tmp_path / "artifacts", "folder/step-*", **plain))
    told = {"update": {"kl_beta": 0.3, "reference": str(home / "base")}}
    again = probe(config_of(home, tmp_path / "artifacts", "folder/step-*", **told))
    assert again.run.was_computed == {"report": 1}  # which says what was meant
    reference, scores = (
        torch.cat([shard.tensors("tokens.safetensors")["logprobs"] for shard in done.run.artifacts(name)])
        for name in ("score-u-reference", "score-u-batch")
    )
    assert (reference - scores).abs().max() > 1e-6
    report = done.result.report.path("report.md").read_text(encoding="utf-8")
    assert "The reference policy is the base without its adapter." in report


def test_a_sweep_over_the_other_layout(home: Path, tmp_path: Path):
    done = probe(config_of(home, tmp_path / "artifacts", "folder/step-*"))
    assert {(row["checkpoint"], row["step"], row["learning_rate"]) for row in done.rows} == {
        ("step-3", 3, LEARNING_RATE)
    }
    assert all(row["gradient_check"] <= 1e-10 for row in done.rows)


def test_both_layouts_are_one_policy(home: Path, tmp_path: Path):
    """The same weights lie in other places: nothing is sampled again."""
    shutil.copytree(home / "plain" / "checkpoint-3", tmp_path / "checkpoint-3" / "model")
    for name in ("optimizer.pt", "trainer_state.json"):
        (tmp_path / "checkpoint-3" / "model" / name).rename(tmp_path / "checkpoint-3" / name)
    config = config_of(home, tmp_path / "artifacts", "plain/checkpoint-3")
    first = probe(config)
    again = probe(config | {"checkpoints": [str(tmp_path / "checkpoint-3")]})
    assert again.run.was_computed.keys() <= {"load-checkpoint", "compute-update", "report"}
    assert [row["delta_h1"] for row in again.rows] == [row["delta_h1"] for row in first.rows]


def test_frozen_parameters_may_be_listed_by_the_optimizer(home: Path, tmp_path: Path):
    """AdamW(model.parameters()) lists the base as well, and has no slot for it."""
    directory = Path(shutil.copytree(home / "folder" / "step-3", tmp_path / "step-3"))
    (directory / "optimizer_param_names.json").unlink()
    base = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    model = with_adapter(base)
    saved = torch.load(directory / "optimizer.pt", weights_only=True)
    names = json.loads((home / "folder" / "step-3" / "optimizer_param_names.json").read_text())
    everything = [name for name, _ in model.named_parameters()]
    saved["state"] = {everything.index(name): saved["state"][i] for i, name in enumerate(names)}
    saved["param_groups"][0]["params"] = list(range(len(everything)))
    torch.save(saved, directory / "optimizer.pt")
    found, expected = read_checkpoint(directory), read_checkpoint(home / "folder" / "step-3")
    assert found.optimizer.moments["exp_avg"].keys() == expected.optimizer.moments["exp_avg"].keys()
    assert all(
        torch.equal(m, expected.optimizer.moments["exp_avg"][name])
        for name, m in found.optimizer.moments["exp_avg"].items()
    )
    assert "model.parameters() in order" in found.assumptions[0]

    saved["state"][0] = copy.deepcopy(saved["state"][everything.index(names[0])])
    torch.save(saved, directory / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"slots of parameters that the adapter does not train: .*wte"):
        read_checkpoint(directory)


# --- the base --------------------------------------------------------------------------------------------------------


def test_the_base_counts_by_its_content(home: Path, tmp_path: Path):
    """Moved, it is the same base; with one weight changed, it is another policy."""
    base = Path(shutil.copytree(home / "base", tmp_path / "moved"))
    config = config_of(home, tmp_path / "artifacts", "plain/checkpoint-3")
    first = probe(config)
    moved = probe(config | {"policy": {"dtype": "float64", "base_model": str(base)}})
    assert moved.run.was_computed == {"report": 1}  # which says that the base was set

    weights = load_file(base / "model.safetensors")
    weights["transformer.ln_f.bias"][0] += 1.0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    other = probe(config | {"policy": {"dtype": "float64", "base_model": str(base)}})
    assert other.run.was_computed["sample-e-batch"] and other.run.was_computed["compute-update"]
    assert other.rows[0]["H"] != first.rows[0]["H"]


def test_a_base_that_changes_under_the_sweep_is_noticed(home: Path, tmp_path: Path):
    from entropy_core.execution import Execution
    from entropy_core.policy.spec import PolicySpec, policy_of

    base = Path(shutil.copytree(home / "base", tmp_path / "moved"))
    config = parse_config(
        config_of(home, tmp_path / "a", "plain/checkpoint-3", policy={"dtype": "float32", "base_model": str(base)})
    )
    (checkpoint,) = preflight(config)
    spec = PolicySpec(
        weights=checkpoint.weights,
        base=checkpoint.base,
        dtype="float32",
        attn_implementation="eager",
        temperature=1.0,
    )
    assert policy_of(spec, Execution(checkpoint.paths, device="cpu")).dtype == torch.float32
    write_json(base / "generation_config.json", {"eos_token_id": 5})
    with pytest.raises(CheckpointError, match="changed after the sweep had begun"):
        policy_of(spec, Execution(checkpoint.paths, device="cpu"))


def test_the_tokenizer_is_the_bases_where_the_adapter_has_none(home: Path, tmp_path: Path):
    directory = Path(shutil.copytree(home / "plain" / "checkpoint-3", tmp_path / "checkpoint-3"))
    for path in directory.glob("tokenizer*"):
        path.unlink()
    done = probe(config_of(tmp_path, tmp_path / "artifacts", "checkpoint-3", importance={"etas": [0]}))
    assert done.rows


def test_a_base_in_shards(home: Path, tmp_path: Path):
    """Of a narrow dtype, too: the adapter keeps its own, and the base is widened."""
    base = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="2KB")
    for path in (home / "base").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "base")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 2
    where = {"base_model": str(tmp_path / "base")}
    done = probe(config_of(home, tmp_path / "artifacts", "plain/checkpoint-3", policy=where, importance={"etas": [0]}))
    assert "Weights are saved as BF16 and widened" in (done.result.run_directory / "report.md").read_text()
    assert all(row["gradient_check"] <= 1e-10 for row in done.rows)


def test_a_base_for_no_adapter_is_refused(home: Path, tmp_path: Path):
    shutil.copytree(home / "base", tmp_path / "checkpoint-0")
    config = config_of(
        tmp_path,
        tmp_path / "artifacts",
        "checkpoint-0",
        policy={"base_model": str(home / "base")},
        update={"optimizer_state": "fresh", "learning_rate": 1e-3},
    )
    with pytest.raises(ConfigError, match="no checkpoint is an adapter"):
        preflight(parse_config(config))


def test_the_configurations_of_the_page(original: Path, tmp_path: Path, monkeypatch):
    """As they are printed, in a folder that has what they name."""
    page = (Path(__file__).parents[1] / "docs" / "bring-your-checkpoint.md").read_text()
    lora, fresh = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    shutil.copytree(original / "base", tmp_path / "models" / "base")
    shutil.copytree(original / "plain" / "checkpoint-3", tmp_path / "runs" / "lora" / "checkpoint-3")
    monkeypatch.chdir(tmp_path)
    (adapter,) = preflight(parse_config(lora))
    assert adapter.base and adapter.paths[adapter.base] == tmp_path / "models" / "base"
    (model,) = preflight(parse_config(lora | fresh | {"update": lora["update"] | fresh["update"], "policy": {}}))
    assert (model.step, model.base) == (0, "")


# --- a fresh optimizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_the_first_step_of_a_fresh_optimizer(home: Path, tmp_path: Path, kind: str):
    """With moments of zero the step is −g/(|g| + ε) in every parameter, whatever optimizer.pt says."""
    checkpoint = "base" if kind == "model" else "plain/checkpoint-3"
    fresh = {"optimizer_state": "fresh", "learning_rate": 5e-4}
    done: Probe = probe(config_of(home, tmp_path / "artifacts", checkpoint, update=fresh))
    (update,) = done.run.artifacts("compute-update")
    clip = update.summary["clip_factor"]
    gradient, direction = (dict(update.vector(name)) for name in ("gradient", "direction"))
    assert any("lora_" in name for name in direction) == (kind == "adapter")
    for name, g in gradient.items():
        torch.testing.assert_close(direction[name], -clip * g / ((clip * g).abs() + 1e-8), rtol=1e-9, atol=1e-12)
    assert {(row["step"], row["learning_rate"]) for row in done.rows} == {(0 if kind == "model" else 3, 5e-4)}
    page = (done.result.run_directory / "report.md").read_text()
    assert "AdamW before its first step, with betas (0.9, 0.999), eps 1e-08, weight decay 0." in page


def test_a_fresh_optimizer_needs_a_learning_rate(home: Path, tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"update.optimizer_state: a fresh optimizer has no learning rate.*Set learning_rate"
    ):
        parse_config(config_of(home, tmp_path / "a", "base", update={"optimizer_state": "fresh"}))
    with pytest.raises(ConfigError, match="no learning rate of its own"):
        read_checkpoint(home / "base", fresh=True)
    with pytest.raises(CheckpointError, match=r"no optimizer\.pt.*say `optimizer_state: fresh`"):
        read_checkpoint(home / "base", 1e-3)


def test_next_step_reads_what_was_loaded(home: Path, tmp_path: Path):
    """The stage's artifact holds the adapter's slots and nothing else."""
    done = probe(config_of(home, tmp_path / "artifacts", "run/checkpoint-3", importance={"etas": [0]}))
    (loaded,) = done.run.artifacts("load-checkpoint")
    saved = read_checkpoint(home / "run" / "checkpoint-3")
    shapes, moments = saved.parameter_shapes, saved.optimizer.moments["exp_avg"]
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    step = OptimizerStep(loaded, done.run.execution, zeros, in_blocks(zeros), 1.0)
    direction = whole(step.part("direction"), zeros)
    assert direction.keys() == shapes.keys()
    assert all(torch.equal(v.sign(), -moments[name].double().sign()) for name, v in direction.items())
    assert set(loaded.manifest["files"]) == {"groups.json", "parameters.parquet"}  # the moments stay where they are
    norms = {name for name in shapes if "ln_f" in name}
    decay, no_decay = loaded.json("groups.json")
    assert norms and norms <= no_decay["parameters"].keys() and not norms & decay["parameters"].keys()


# --- the reference policy --------------------------------------------------------------------------------------------


def test_the_reference_policy_is_that_of_the_trainer(home: Path, tmp_path: Path):
    """The adapter in `ref/`, any adapter that is named, or else the base."""
    asked = config_of(home, tmp_path / "artifacts", "plain/checkpoint-3", update={"kl_beta": 0.1})
    (bare,) = preflight(parse_config(asked))
    assert bare.reference == (bare.base,)
    directory = home / "plain" / "checkpoint-3"
    ref = directory / "ref"
    ref.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(directory / name, ref / name)
    (kept,) = preflight(parse_config(asked))
    weights, base = kept.reference
    assert (kept.paths[weights], base) == (ref.resolve(), kept.base)
    assert kept.digest == bare.digest and "The reference policy is that in `ref/`." in kept.assumptions
    elsewhere = Path(shutil.copytree(ref, tmp_path / "supervised"))
    (named,) = preflight(parse_config(asked | {"update": asked["update"] | {"reference": str(elsewhere)}}))
    assert named.reference == kept.reference and named.paths[weights] == elsewhere.resolve()


def test_a_named_adapter_is_in_its_folder(home: Path, tmp_path: Path):
    directory = home / "plain" / "checkpoint-3"
    plain = read_checkpoint(directory)
    (directory / "policy").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.move(directory / name, directory / "policy" / name)
    named = read_checkpoint(directory)
    assert named.parameter_shapes == plain.parameter_shapes and named.layout.model == directory / "policy"

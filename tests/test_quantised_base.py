"""LoRA on a base that bitsandbytes has quantised, against its own dequantisation, without bitsandbytes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from lora_fixtures import make_lora
from pipeline_fixtures import probe, skip_figures
from safetensors.torch import load_file, save_file
from test_adapters import config_of
from transformers import AutoModelForCausalLM, LlamaConfig

from entropy_core.checkpoints.checkpoint import read_checkpoint
from entropy_core.checkpoints.content import stored_tensors
from entropy_core.checkpoints.layout import find_layout
from entropy_core.checkpoints.quantised_base import as_dense, dense_weights
from entropy_core.demo.run import build_tokenizer
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import weights_digest
from entropy_core.pipeline.named_base import comparable_base
from entropy_core.policy.pretrained import load_policy
from entropy_core.store.columns import read_tokens

OTHERS = Path(__file__).parent / "of_other_writers"
KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])


def dense(kind: str) -> dict[str, torch.Tensor]:
    """The model with the layers that bitsandbytes dequantised itself."""
    truth = load_file(OTHERS / f"base_{kind}" / "truth.safetensors")
    del truth["logits"]
    rest = load_file(OTHERS / f"base_{kind}" / "model.safetensors")
    return {name: t for name, t in rest.items() if t.dtype == torch.bfloat16} | truth


def run(kind: str, home: Path) -> Path:
    """An adapter that was trained on the dequantised base, and names the quantised one."""
    base = Path(shutil.copytree(OTHERS / f"base_{kind}", home / "base"))
    (base / "truth.safetensors").unlink()
    build_tokenizer().save_pretrained(base)
    config = LlamaConfig.from_pretrained(base)
    del config.quantization_config
    config.save_pretrained(home / "dense")
    weights = {name: weight.float().contiguous() for name, weight in dense(kind).items()}
    save_file(weights, home / "dense" / "model.safetensors", {"format": "pt"})
    build_tokenizer().save_pretrained(home / "dense")
    lora = {"target_modules": ["q_proj", "down_proj"], "fan_in_fan_out": False}
    return make_lora(home / "run" / "checkpoint-3", home / "dense", **lora)


@KINDS
def test_the_weights_are_those_of_bitsandbytes(kind: str) -> None:
    directory, truth = OTHERS / f"base_{kind}", dense(kind)
    found = dict(dense_weights(directory, stored_tensors(directory)))
    assert found.keys() == truth.keys() and len(found) == 12
    for name, weight in truth.items():
        if kind == "nf4":
            assert torch.equal(found[name], weight), name
        else:
            torch.testing.assert_close(found[name], weight.to(found[name].dtype), rtol=1e-6, atol=1e-9)


@KINDS
def test_the_policy_under_an_adapter(kind: str, tmp_path: Path) -> None:
    checkpoint = run(kind, tmp_path)
    found, plain = (read_checkpoint(checkpoint, base_model=tmp_path / base) for base in ("base", "dense"))
    assert found.optimizer.step == plain.optimizer.step and found.parameter_shapes == plain.parameter_shapes
    (said,) = [one for one in found.assumptions if "quantised" in one]
    assert "bitsandbytes" in said and ("activations" in said) == (kind == "int8")
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        logits = [
            load_policy(checkpoint, base, "float64", "eager", "cpu", tmp_path / base).model(ids).logits
            for base in ("base", "dense")
        ]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)(ids).logits
    theirs = load_file(OTHERS / f"base_{kind}" / "truth.safetensors")["logits"]
    assert float((alone - theirs).norm() / theirs.norm()) < 0.02  # it computes in bfloat16, or with 8-bit activations


def test_a_sweep_on_a_quantised_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_figures(monkeypatch)
    run("nf4", tmp_path)
    one, other = (
        probe(
            config_of(
                tmp_path,
                tmp_path / "artifacts",
                "run/checkpoint-3",
                policy={"dtype": "float64", "base_model": str(tmp_path / base)},
            )
        )
        for base in ("base", "dense")
    )
    for row, same in zip(one.rows, other.rows, strict=True):
        assert row["delta_h1"] == pytest.approx(same["delta_h1"], rel=1e-9)
        assert row["H"] == pytest.approx(same["H"], rel=1e-12)


def named(checkpoint: Path, base: str) -> Path:
    """The adapter, as if it had been trained on that base."""
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    return checkpoint


def test_the_difference_that_another_base_makes_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_figures(monkeypatch)
    named(run("nf4", tmp_path), str(tmp_path / "base"))
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    moved = {name: w + 0.01 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(moved, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    config = config_of(
        tmp_path, tmp_path / "artifacts", "run/checkpoint-3", policy={"base_model": str(tmp_path / "dense")}
    )
    found = probe(config)
    ours, theirs = (
        read_tokens(found.run.artifacts(f"score-u-{of}"), "logprobs")["logprobs"] for of in ("batch", "reference")
    )
    policies = [shard.manifest["inputs"]["policy"] for shard in found.run.artifacts("score-u-reference")]
    assert {policy["base"] for policy in policies} == {weights_digest(tmp_path / "base")}
    mean = float((ours - theirs).abs().mean())
    assert mean > 1e-4
    (said,) = [
        line
        for line in (found.result.run_directory / "report.md").read_text().splitlines()
        if "names the quantised base" in line
    ]
    assert f"differs by {mean:.2g} nats on average" in said and "probed on dense" in said


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("unsloth/Some-3B-bnb-4bit", "dense .* in place of unsloth/Some-3B-bnb-4bit is not measured: .*not on this"),
        ("{}/gptq", "not measured: it cannot be read .*gptq"),
    ],
)
def test_another_base_that_cannot_be_compared_is_said(base: str, said: str, tmp_path: Path) -> None:
    checkpoint = named(run("nf4", tmp_path), base.format(tmp_path))
    shutil.copytree(tmp_path / "base", tmp_path / "gptq")
    path = tmp_path / "gptq" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    home, why = comparable_base(find_layout(checkpoint, tmp_path / "dense"))
    assert home is None and re.search(said, why)
    named(checkpoint, str(tmp_path / "base"))
    assert comparable_base(find_layout(checkpoint, tmp_path / "dense")) == (tmp_path / "base", "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_method": "gptq"}, "quantization_config of gptq"),
        ({"load_in_4bit": False}, "quantization_config of bitsandbytes, which is not read"),
    ],
)
def test_another_quantisation_is_refused(change: dict, said: str, tmp_path: Path) -> None:
    checkpoint = run("nf4", tmp_path)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        read_checkpoint(checkpoint, base_model=tmp_path / "base")


@pytest.mark.parametrize("lost", ["weight.absmax", "weight.quant_state.bitsandbytes__nf4"])
def test_codes_without_what_belongs_to_them_are_refused(lost: str, tmp_path: Path) -> None:
    checkpoint = run("nf4", tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.layers.0.mlp.up_proj.{lost}"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj"):
        read_checkpoint(checkpoint, base_model=tmp_path / "base")
        load_policy(checkpoint, lost, "float32", "eager", "cpu", tmp_path / "base")


STATES = {
    "a number that no float holds": b'{"shape": [3], "dtype": "float32", "blocksize": 64, "nested_offset": 1%s}'
    % (b"0" * 400),
    "no size": b'{"shape": [3], "dtype": "float32", "blocksize": true}',
    "a shape in words": b'{"shape": "x", "dtype": "float32", "blocksize": 64}',
    "a dtype in a list": b'{"shape": [3], "dtype": [], "blocksize": 64}',
    "a list": b"[]",
    "lists without end": b"[" * 100_000,
    "more bytes than there are, in eight": torch.tensor(2**45),
    "numbers that are no bytes": torch.tensor([300, -1]),
    "fractions": torch.tensor([0.5]),
}


@pytest.mark.attack("a quantised base that makes no sense")
@pytest.mark.parametrize("name", STATES)
def test_a_state_that_makes_no_sense_is_refused(name: str, tmp_path: Path) -> None:
    base = Path(shutil.copytree(OTHERS / "base_nf4", tmp_path / "base"))
    tensors, said = load_file(base / "model.safetensors"), STATES[name]
    state = said if isinstance(said, torch.Tensor) else torch.tensor(list(said), dtype=torch.uint8)
    tensors["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"] = state
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.* do not fit together"):
        as_dense(base, stored_tensors(base))

"""DoRA, and initialisations that change the base, against PEFT's own training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gpt2, policy_of, random_direction
from lora_fixtures import make_base, make_lora, trained, with_adapter
from pipeline_fixtures import probe, skip_figures
from safetensors.torch import load_file, save_file
from test_adapters import ADAPTERS, PEFT_PREFIX, TAU, adapter_of, config_of, five_point, plain, rows, torch_step
from transformers import AutoModelForCausalLM

from entropy_core.checkpoints.adapters import fill_adapter, insert_adapter
from entropy_core.checkpoints.dora import held_norms
from entropy_core.errors import CheckpointError
from entropy_core.policy.derivatives import token_derivatives
from entropy_core.policy.model import Coefficients

DORA: dict[str, Any] = {"use_dora": True}


def test_the_gradient_of_a_dora_policy_is_peft_s_where_norms_are_held_and_its_own_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADAPTERS, "DoRA", (gpt2, {"target_modules": ["c_attn", "c_fc"], **DORA}))
    expected, model = adapter_of("DoRA", tmp_path)
    policy = policy_of(model, head_chunk_rows=3)
    expected.set_attn_implementation("sdpa")
    weights = Coefficients(*torch.randn(2, 7, dtype=torch.float64))

    def theirs() -> dict[str, torch.Tensor]:
        found = plain(expected)
        (weights.logprob_K @ found[0] + weights.entropy_K @ found[1]).backward()
        return {n.removeprefix(PEFT_PREFIX): p.grad for n, p in trained(expected).items()}

    def ours() -> dict[str, torch.Tensor]:
        gradients = policy.new_accumulator()
        policy.add_gradients(rows(), [weights], TAU, [gradients])
        return gradients

    of_peft, moving = theirs(), ours()
    with held_norms(model):
        held = ours()
    for name, g in of_peft.items():
        torch.testing.assert_close(held[name], g, rtol=1e-9, atol=1e-12, msg=name)
    assert any(not torch.allclose(held[name], moving[name], rtol=1e-3) for name in held)

    v = random_direction(policy)
    true = token_derivatives(policy, rows(), v, TAU)
    torch.testing.assert_close(tuple(true[2:]), five_point(policy, v, 1e-3), rtol=1e-8, atol=1e-8)
    forward = float(weights.logprob_K @ true.dlogprobs_K + weights.entropy_K @ true.dentropies_K)
    assert forward == pytest.approx(sum(float((moving[n] * v[n]).sum()) for n in v), rel=1e-8)
    with held_norms(model):  # and what forward mode says of the tokens of U goes with the trainer's gradient
        of_u = token_derivatives(policy, rows(), v, TAU)
    forward = float(weights.logprob_K @ of_u.dlogprobs_K + weights.entropy_K @ of_u.dentropies_K)
    assert forward == pytest.approx(sum(float((held[n] * v[n]).sum()) for n in v), rel=1e-8)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_sweep_over_dora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_figures(monkeypatch)
    base = make_base(tmp_path / "base")
    make_lora(tmp_path / "run" / "checkpoint-3", base, **DORA, use_rslora=True)
    done = probe(config_of(tmp_path, tmp_path / "artifacts", "run/checkpoint-3", update={"max_grad_norm": 0.05}))
    (update,), (loaded,) = (done.run.artifacts(name) for name in ("compute-update", "load-checkpoint"))
    gradient, direction = (update.vector(name) for name in ("gradient", "direction"))
    theirs = torch_step(tmp_path / "run/checkpoint-3", base, {name: gradient[name].double() for name in gradient})
    for name, v in theirs.items():
        torch.testing.assert_close(direction[name].double().view(v.shape), v, rtol=1e-9, atol=1e-9)
    assert any("lora_magnitude_vector" in name for name in theirs)
    assert any("holds the norms" in said for said in loaded.summary["assumptions"])
    for row in done.rows:
        assert row["gradient_check"] <= 1e-10
    assert max(map(abs, done.run.artifacts("first-order-u")[0].summary["closure"].values())) < 1e-9


@pytest.mark.parametrize("initialised", ["pissa", "olora"])
@pytest.mark.parametrize("saved", ["original", "residual"])
def test_the_base_of_an_adapter_that_changed_it(initialised: str, saved: str, tmp_path: Path) -> None:
    """The policy is that of the model that PEFT trained, from the base as it was and from the base without factors."""
    torch.manual_seed(3)
    model = small_llama()
    model.save_pretrained(tmp_path / "base")
    lora = {"target_modules": ["q_proj", "down_proj"], "fan_in_fan_out": False, "init_lora_weights": initialised}
    peft_model = with_adapter(model, **lora)
    with torch.no_grad():
        for p in trained(peft_model).values():
            p += 0.02 * p.abs().mean() * torch.randn_like(p)
    peft_model.save_pretrained(tmp_path / "adapter")
    if saved == "residual":
        shutil.rmtree(tmp_path / "base")
        residual = {
            n.removeprefix(PEFT_PREFIX).replace(".base_layer", ""): p for n, p in peft_model.state_dict().items()
        }
        plain_model = small_llama()
        plain_model.load_state_dict({n: p for n, p in residual.items() if "lora_" not in n})
        plain_model.save_pretrained(tmp_path / "base")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    insert_adapter(ours, tmp_path / "adapter")
    fill_adapter(ours, tmp_path / "adapter")
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            ours.eval()(ids).logits, peft_model.double().eval()(ids).logits, rtol=1e-4, atol=1e-5
        )
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()(ids).logits
    assert (other - ours(ids).logits).abs().max() > 1e-3


def small_llama() -> Any:
    from checkpoint_fixtures import make_model

    return make_model(initializer_range=0.3)


def test_a_base_that_is_neither_is_refused(tmp_path: Path) -> None:
    model = small_llama()
    model.save_pretrained(tmp_path / "base")
    peft_model = with_adapter(
        model, target_modules=["q_proj", "down_proj"], fan_in_fan_out=False, init_lora_weights="pissa"
    )
    peft_model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {first: torch.randn_like(tensors[first])}, tmp_path / "adapter" / "adapter_model.safetensors")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    insert_adapter(ours, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"neither the one .* nor the residual one: 3 of 4 layers"):
        fill_adapter(ours, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"init_lora_weights": "pissa_niter_4"})
    )
    with pytest.raises(CheckpointError, match="neither"):
        fill_adapter(ours, tmp_path / "adapter")

"""Checkpoints of every layout that cannot be probed: each is refused with what is so and what to do, and no code runs.

Every directory also holds a `training_args.bin` that would leave a file behind if anybody opened it. The table of
errors is printed at the end; `-s` shows it.
"""

import json
import math
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_fixtures import RunsCode, optimizer, remove, tensors, tensors_of, text, truncate
from lora_fixtures import make_base, make_lora, write_json
from pipeline_fixtures import make_gpt2, probe, skip_figures, values

from entropy_core.errors import ProbeError

Spoil = Callable[[Path], Any]


def witness(directory: Path) -> Path:
    return directory.parent / "executed"


def entries(name: str, **changes: Any) -> Spoil:
    return lambda directory: write_json(directory / name, json.loads((directory / name).read_text()) | changes)


def slots(*keys: str) -> Spoil:
    """The state of an optimizer whose slots have these names."""
    return optimizer(lambda s: s.update(state={i: {key: torch.ones(2) for key in keys} for i in s["state"]}))


def archive_with_code(directory: Path) -> None:
    torch.save({"state": {}, "param_groups": [], "more": RunsCode(witness(directory))}, directory / "optimizer.pt")


def pickle_with_code(directory: Path) -> None:
    (directory / "optimizer.pt").write_bytes(pickle.dumps(RunsCode(witness(directory))))


def adapter_with_code(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    torch.save(SimpleNamespace(planted=RunsCode(witness(directory))), directory / "adapter_model.bin")


def lost_shard(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": "model-00002-of-00002.safetensors"}}
    write_json(directory / "model.safetensors.index.json", index)


def empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def other_base(width: int) -> Spoil:
    def spoil(directory: Path) -> None:
        base = make_base(directory.parent / "other", n_embd=width)
        entries("adapter_config.json", base_model_name_or_path=str(base))(directory)

    return spoil


def base_is_an_adapter(directory: Path) -> None:
    shutil.copytree(directory, directory.parent / "lower")
    entries("adapter_config.json", base_model_name_or_path=str(directory.parent / "lower"))(directory)


WTE, FACTOR = "transformer.wte.weight", "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
ADAPTER = "adapter_model.safetensors"
BROKEN: dict[str, tuple[str, Spoil, str]] = {
    # full fine-tuning, as the Trainer saves it
    "an empty directory": ("full", empty, r"has no config\.json"),
    "a slot too many": ("full", optimizer(lambda s: s["state"].update({99: s["state"][0]})), "no parameter group: 99"),
    "a slot of a wrong shape": (
        "full",
        optimizer(lambda s: s["state"][0].update(exp_avg=torch.ones(3))),
        rf"another shape than their parameter: {WTE} \(exp_avg \(3,\)",
    ),
    "a slot that is NaN": ("full", optimizer(lambda s: s["state"][0]["exp_avg"].fill_(math.nan)), "NaN.*earlier"),
    "an optimizer cut off": ("full", truncate("optimizer.pt"), "not a complete archive"),
    "an archive with code": ("full", archive_with_code, r"\((posix|nt)\.mkdir\), and was not executed"),
    "a pickle with code": ("full", pickle_with_code, "was not read.*bare pickle"),
    "SGD": ("full", slots("momentum_buffer"), "the run used SGD"),
    "Adafactor": ("full", slots("step", "exp_avg_sq_row", "exp_avg_sq_col", "RMS"), "the run used Adafactor"),
    "torch's Adafactor": ("full", slots("step", "row_var", "col_var", "variance"), "the run used torch's Adafactor"),
    "an 8-bit Lion": ("full", slots("step", "state1", "qmap1", "absmax1"), "bitsandbytes that is not Adam"),
    "an 8-bit LAMB": ("full", slots("step", "state1", "state2", "unorm_vec"), "bitsandbytes that is not Adam"),
    "Lion": ("full", slots("exp_avg"), "the run used Lion"),
    "weights cut off": ("full", truncate("model.safetensors"), r"model\.safetensors cannot be opened"),
    "a shard is missing": ("full", lost_shard, r"model-00002-of-00002\.safetensors cannot be opened"),
    "weights that are NaN": (
        "full",
        tensors(lambda s: s["transformer.ln_f.weight"].fill_(math.nan)),
        "the logits of sequence 0 are not finite at position 0.*weights contain a NaN",
    ),
    "quantised weights": (
        "full",
        tensors(lambda s: s.update({WTE: s[WTE].to(torch.int8)})),
        "stores weights as I8",
    ),
    "a quantised model": ("full", entries("config.json", quantization_config={"bits": 4}), "has a quantization_config"),
    "no step": ("full", text("trainer_state.json", "{}"), "global_step None"),
    "no file that says a step": (
        "full",
        remove("trainer_state.json"),
        r"no trainer_state\.json or training_info\.json",
    ),
    # an adapter, as the Trainer saves it
    "a base that is not here": (
        "lora",
        entries("adapter_config.json", base_model_name_or_path="Qwen/Qwen2.5-0.5B"),
        r"'Qwen/Qwen2\.5-0\.5B', which is no directory here.*nothing is downloaded.*set `policy\.base_model`",
    ),
    "no base at all": ("lora", entries("adapter_config.json", base_model_name_or_path=None), "its files name none"),
    "a base that is an adapter": ("lora", base_is_an_adapter, "is an adapter itself"),
    "an adapter of a wider base": ("lora", other_base(32), r"other shapes than its base and its ranks give: .*lora_A"),
    "an adapter_config.json that is no JSON": ("lora", text("adapter_config.json", "{"), "not readable JSON"),
    "no adapter_config.json": ("lora", remove("adapter_config.json"), r"is an adapter, whose adapter_config\.json is"),
    "other layers in adapter_config.json": (
        "lora",
        entries("adapter_config.json", target_modules=["c_attn"]),
        r"holds tensors that the adapter does not have: .*c_fc\.lora_A",
    ),
    "layers that the base does not have": (
        "lora",
        entries("adapter_config.json", target_modules=["q_proj"]),
        "does not fit into its base model",
    ),
    "another rank": ("lora", entries("adapter_config.json", r=3), r"lora_A\.weight \(2, 16\) \(here \(3, 16\)\)"),
    "a factor is missing": ("lora", tensors_of(ADAPTER, lambda s: s.pop(FACTOR)), r"no weights for .*c_attn\.lora_A"),
    "an adapter cut off": ("lora", truncate(ADAPTER), r"adapter_model\.safetensors cannot be opened"),
    "an adapter as a pickle": ("lora", adapter_with_code, r"no adapter_model\.safetensors.*which is a pickle"),
    "LoftQ": ("lora", entries("adapter_config.json", init_lora_weights="loftq"), "'loftq', which changes the base"),
    "IA3": ("lora", entries("adapter_config.json", peft_type="IA3"), "uses peft_type 'IA3'"),
    "a setting of a newer PEFT": ("lora", entries("adapter_config.json", use_hyperlora=True), "does not know: use_hyp"),
    # a model in a folder of its own, and the names in a file
    "names too few": (
        "folder",
        text("optimizer_param_names.json", '["a"]'),
        r"lists 1 names, optimizer\.pt 4 parameters",
    ),
    "names of another model": (
        "folder",
        text("optimizer_param_names.json", '["a", "b", "c", "d"]'),
        "names parameters that the model does not have.*: a, b, c, d",
    ),
    "names that are none": ("folder", text("optimizer_param_names.json", "[1, 2]"), "is not a JSON list of names"),
    "no step in training_info.json": (
        "folder",
        text("training_info.json", "{}"),
        r"training_info\.json has global_step",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("sound")
    base = make_base(home / "base")
    return {
        "full": make_gpt2(home / "full" / "checkpoint-3"),
        "lora": make_lora(home / "lora" / "checkpoint-3", base),
        "folder": make_lora(home / "folder" / "checkpoint-3", base, layout="folder"),
    }


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, str]]:
    """Case → error, printed when all are through."""
    errors: dict[str, str] = {}
    yield errors
    print(f"\n{len(errors)} broken checkpoints")
    for case, error in errors.items():
        print(f"{case:40} {error}")


def refusal(directory: Path) -> ProbeError:
    config = values(
        directory.parent,
        directory.parent / "artifacts",
        batch_config={"E_total_sequences": 2, "B_U": 2, "G": 2},
        generation={"max_new_tokens": 2},
        importance={"etas": [0]},
    )
    with pytest.raises(ProbeError) as raised:
        probe(config)
    return raised.value


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint(sound, table, tmp_path: Path, case: str):
    layout, spoil, message = BROKEN[case]
    directory = Path(shutil.copytree(sound[layout], tmp_path / "checkpoint-3"))
    spoil(directory)
    torch.save(SimpleNamespace(planted=RunsCode(witness(directory))), directory / "training_args.bin")
    error = refusal(directory)
    assert error.fix and "\n" not in str(error)
    assert re.search(message, str(error)), error
    assert not witness(directory).exists()
    table[case] = str(error).replace(str(directory), "…")


@pytest.mark.parametrize("layout", ["full", "lora", "folder"])
def test_the_sound_ones_are_probed(sound, layout: str, tmp_path: Path, monkeypatch):
    """So that each refusal above is of what was broken; and the code that was never run does run."""
    skip_figures(monkeypatch)
    directory = Path(shutil.copytree(sound[layout], tmp_path / "checkpoint-3"))
    torch.save(SimpleNamespace(planted=RunsCode(witness(directory))), directory / "training_args.bin")
    done = probe(values(tmp_path, tmp_path / "artifacts", importance={"etas": [0]}))
    assert done.rows and not witness(directory).exists()
    torch.load(directory / "training_args.bin", weights_only=False)
    assert witness(directory).exists()

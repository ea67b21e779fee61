"""Whatever is not a complete AdamW checkpoint is refused with a message that names the fault; none of its code runs."""

import contextlib
import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from checkpoint_fixtures import (
    EMBEDDING,
    STEPS,
    RunsCode,
    make_model,
    optimizer,
    remove,
    set_group,
    tensors,
    text,
    train,
    truncate,
)
from pipeline_fixtures import make_gpt2, trainer_groups
from safetensors import safe_open

from entropy_core.checkpoints.checkpoint import read_checkpoint
from entropy_core.checkpoints.optimizer_state import check_moments
from entropy_core.checkpoints.tokenizer import load_tokenizer
from entropy_core.errors import CheckpointError
from entropy_core.files import digests as digests_of_files
from entropy_core.files.checkpoint import file_digests
from entropy_core.policy.pretrained import load_policy


def each_slot(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return optimizer(lambda saved: [change(slot) for slot in saved["state"].values()])


def other_optimizer(build: Callable[[Iterable], torch.optim.Optimizer], steps: int = STEPS) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        model = make_model()
        other = build(trainer_groups(model))
        train(model, other, steps)
        torch.save(other.state_dict(), directory / "optimizer.pt")

    return change


def swap_groups(saved: dict) -> None:
    saved["param_groups"].reverse()


def swap_two_indices(saved: dict) -> None:
    indices = saved["param_groups"][0]["params"]
    indices[0], indices[1] = indices[1], indices[0]


def three_groups(saved: dict) -> None:
    last = saved["param_groups"][1]
    saved["param_groups"].append(last | {"params": [last["params"].pop()]})


def drop_parameter(saved: dict) -> None:
    """As if q_proj of layer 0 had been frozen before the optimizer was made."""
    saved["state"].pop(saved["param_groups"][0]["params"].pop(1))


def foreign_name(saved: dict) -> None:
    for group in saved["param_groups"]:
        group["param_names"] = [f"transformer.h.{i}.weight" for i in group["params"]]


def entries(name: str, **changes: object) -> Callable[[Path], object]:
    def edit(directory: Path) -> None:
        (directory / name).write_text(json.dumps(json.loads((directory / name).read_text()) | changes))

    return edit


def sharded(shard: object) -> Callable[[Path], object]:
    """The weights in one shard that the index names `shard`; its file is made only for parts/… and ../… names."""

    def edit(directory: Path) -> None:
        with safe_open(directory / "model.safetensors", "np") as file:
            names = list(file.keys())
        if isinstance(shard, str) and shard.startswith(("parts", "..")):
            (directory / "parts").mkdir()
            shutil.copyfile(directory / "model.safetensors", directory / shard)
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))

    return edit


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "There is no directory"),
    "no config": (remove("config.json"), "has no config.json"),
    "config is not JSON": (text("config.json", "{"), r"config\.json is not readable JSON"),
    "config is a list": (text("config.json", "[]"), "holds a JSON list"),
    "config of an unknown model": (text("config.json", '{"model_type": "nonesuch"}'), "does not describe a causal"),
    "config of custom code": (
        text("config.json", '{"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.X"}}'),
        "custom code is not run",
    ),
    "more layers than the files have": (
        entries("config.json", num_hidden_layers=10**9),
        "it says 1000000000 layers, and the files hold 21 tensors",
    ),
    "a kernel on the hub": (
        entries("config.json", attn_implementation="kernels-community/flash-attn3"),
        "asks for attn_implementation 'kernels-community/flash-attn3', which is code on the hub",
    ),
    "a kernel on the hub, further in": (
        entries("config.json", text_config={"layers": [{"_attn_implementation": "someone/kernel:fn"}]}),
        "asks for _attn_implementation 'someone/kernel:fn'",
    ),
    "a truncated generation config": (
        truncate("generation_config.json"),
        r"generation_config\.json is not readable JSON",
    ),
    "a generation config that is a list": (text("generation_config.json", "[]"), "holds a JSON list"),
    "an EOS id beyond the vocabulary": (
        entries("generation_config.json", eos_token_id=24),
        "24 ends a response, and .* 0 to 23",
    ),
    "an EOS id below 0 in a list": (entries("generation_config.json", eos_token_id=[2, -1]), "-1 ends"),
    "an EOS id that is a string": (entries("generation_config.json", eos_token_id="</s>"), "'</s>' ends a response"),
    "an EOS id that is a boolean": (entries("generation_config.json", eos_token_id=True), "True ends a response"),
    "shards in a subfolder": (sharded("parts/model.safetensors"), "not files beside it: parts/model.safetensors"),
    "shards in a parent": (sharded("../model.safetensors"), r"not files beside it: \.\./model"),
    "shards elsewhere": (sharded("/tmp/model.safetensors"), "not files beside it: /tmp/model"),
    "a shard without a name": (sharded(""), "not files beside it"),
    "a shard that is a number": (sharded(5), "not files beside it: 5"),
    "adapter": (text("adapter_config.json", "{}"), "holds both an adapter"),
    "no weights": (remove("model.safetensors"), "has no weights"),
    "truncated weights": (truncate("model.safetensors"), r"model\.safetensors cannot be opened"),
    "not a safetensors file": (text("model.safetensors", "version https://git-lfs"), "cannot be opened"),
    "a weight is missing": (tensors(lambda s: s.pop(EMBEDDING)), f"no weights for {EMBEDDING}"),
    "a weight of another shape": (
        tensors(lambda s: s.update({EMBEDDING: torch.zeros(25, 8)})),
        rf"other shapes than config\.json says: {EMBEDDING} \(25, 8\) \(config: \(24, 8\)\)",
    ),
    "no trainer state": (remove("trainer_state.json"), r"has no trainer_state\.json"),
    "trainer state is not JSON": (truncate("trainer_state.json"), r"trainer_state\.json is not readable JSON"),
    "no global step": (text("trainer_state.json", "{}"), "global_step None"),
    "global step 0": (text("trainer_state.json", '{"global_step": 0}'), "global_step 0"),
    "no optimizer": (remove("optimizer.pt"), r"has no optimizer\.pt.*save_only_model=True"),
    "truncated optimizer": (truncate("optimizer.pt"), "not a complete archive"),
    "empty optimizer": (text("optimizer.pt", ""), "not a complete archive"),
    "optimizer is a list": (lambda d: torch.save([1], d / "optimizer.pt"), "not the state_dict of a torch optimizer"),
    "optimizer without groups": (optimizer(lambda s: s.pop("param_groups")), "not the state_dict"),
    "Adagrad": (other_optimizer(lambda g: torch.optim.Adagrad(g, lr=0.1)), "the run used Adagrad"),
    "Adadelta": (other_optimizer(lambda g: torch.optim.Adadelta(g, lr=0.1)), "the run used RMSprop or Adadelta"),
    "Adamax": (other_optimizer(lambda g: torch.optim.Adamax(g, lr=0.1)), "the run used Adamax"),
    "ASGD": (other_optimizer(lambda g: torch.optim.ASGD(g, lr=0.1)), "the run used ASGD"),
    "RMSprop": (other_optimizer(lambda g: torch.optim.RMSprop(g, lr=0.1)), "square_avg.*RMSprop"),
    "NAdam": (other_optimizer(lambda g: torch.optim.NAdam(g, lr=0.1)), "mu_product.*NAdam"),
    "RAdam": (other_optimizer(lambda g: torch.optim.RAdam(g, lr=0.1)), "not torch's Adam or AdamW"),
    "first moment only": (each_slot(lambda slot: slot.pop("exp_avg_sq")), r"its slots are exp_avg, step"),
    "AdamW before a step": (other_optimizer(lambda g: torch.optim.AdamW(g, lr=0.1), steps=0), "has no slots"),
    "no betas, no eps": (
        optimizer(lambda s: [s["param_groups"][1].pop(k) for k in ("betas", "eps")]),
        "no betas, eps in",
    ),
    "no learning rate": (optimizer(lambda s: s["param_groups"][0].pop("lr")), "has no lr in param group 0"),
    "no weight decay": (optimizer(lambda s: s["param_groups"][0].pop("weight_decay")), "has no weight_decay in"),
    "betas out of range": (optimizer(set_group("betas", (0.9, 1.0), (0.9, 1.0))), "out of range"),
    "NaN learning rate": (optimizer(set_group("lr", math.nan, math.nan)), "out of range: lr nan"),
    "learning rate 0": (
        optimizer(set_group("lr", 0.0, 0.0)),
        "learning rate 0 in every.*schedule.*set `learning_rate`",
    ),
    "slots of other parameters only": (
        optimizer(lambda s: s.update(state={99: s["state"][0]})),
        "no parameter group: 99",
    ),
    "a frozen parameter": (
        optimizer(drop_parameter),
        r"15 \+ 5 parameters, the model has 16 \+ 5.*1 missing among .*q_proj",
    ),
    "extra slots": (optimizer(lambda s: s["state"].update({99: s["state"][0]})), "no parameter group: 99"),
    "groups in another order": (optimizer(swap_groups), r"lists 5 \+ 16 parameters"),
    "indices in another order": (
        optimizer(swap_two_indices),
        rf"another shape than their parameter: {EMBEDDING} \(exp_avg \(8, 8\), model \(24, 8\)\)",
    ),
    "three groups": (optimizer(three_groups), "3 param groups and no parameter names"),
    "decay in both groups": (optimizer(set_group("weight_decay", 0.1, 0.1)), "groups are not the Trainer's"),
    "names of another model": (optimizer(foreign_name), r"does not have.*transformer\.h\.0"),
    "wrong shape": (
        optimizer(lambda s: s["state"][0].update(exp_avg_sq=torch.ones(8, 24))),
        rf"{EMBEDDING} \(exp_avg_sq \(8, 24\), model \(24, 8\)\)",
    ),
    "one moment is missing": (optimizer(lambda s: s["state"][0].pop("exp_avg_sq")), rf"lack a moment: {EMBEDDING}"),
    "amsgrad without its slot": (optimizer(set_group("amsgrad", True, False)), "max_exp_avg_sq"),
    "NaN": (optimizer(lambda s: s["state"][0]["exp_avg"][3].fill_(math.nan)), rf"NaN.*{EMBEDDING} \(exp_avg\)"),
    "infinity": (optimizer(lambda s: s["state"][0]["exp_avg_sq"][3].fill_(math.inf)), rf"{EMBEDDING} \(exp_avg_sq\)"),
    "a negative square": (
        optimizer(lambda s: s["state"][0]["exp_avg_sq"][3].fill_(-1.0)),
        rf"{EMBEDDING} \(exp_avg_sq\)",
    ),
    "no step count": (
        optimizer(lambda s: s["state"][0].pop("step")),
        f"no step count, or an impossible one, for {EMBEDDING}",
    ),
    "step 0": (each_slot(lambda slot: slot["step"].zero_()), "no step count, or an impossible one"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused(sound: Path, case: str) -> None:
    read_checkpoint(sound)
    break_it, message = BROKEN[case]
    break_it(sound)
    with pytest.raises(CheckpointError, match=message) as refusal:
        checkpoint = read_checkpoint(sound)
        assert checkpoint.layout.optimizer is not None
        check_moments(checkpoint.layout.optimizer, checkpoint.optimizer)
    said = str(refusal.value)
    assert "\n" not in said and str(sound) in said and refusal.value.fix


@pytest.mark.attack("code in the pickle of an optimizer")
def test_code_in_a_pickle_is_not_executed(sound: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    payload = {"state": {}, "param_groups": [{"params": []}], "more": RunsCode(witness)}
    torch.save(payload, sound / "optimizer.pt")
    with pytest.raises(
        CheckpointError, match=r"more than tensors and numbers \((posix|nt)\.mkdir\), and was not executed"
    ):
        read_checkpoint(sound)
    (sound / "optimizer.pt").write_bytes(pickle.dumps(payload))
    with pytest.raises(CheckpointError, match="bare pickle"):
        read_checkpoint(sound)
    assert not witness.exists()

    pickle.loads((sound / "optimizer.pt").read_bytes())  # the payload does work
    assert witness.exists()


@pytest.mark.attack("code beside a tokenizer, and a yes to whether it may run")
def test_code_beside_a_tokenizer_is_not_run_whatever_is_answered(tmp_path: Path, monkeypatch) -> None:
    """transformers would ask at the terminal whether to run the tokenizer's code; answering yes must not run it."""
    directory, witness = make_gpt2(tmp_path / "checkpoint-3"), tmp_path / "executed"
    (directory / "tokenization_x.py").write_text(f"import os\nos.mkdir({str(witness)!r})\nclass X: ...\n")
    custom = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    entries("tokenizer_config.json", **custom)(directory)
    text("config.json", '{"model_type": "llama"}')(directory)  # which has no tokenizer of its own
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with contextlib.suppress(CheckpointError):  # either outcome is fine: refused, or loaded without that code
        load_tokenizer(directory)
    assert asked == [] and not witness.exists()


@pytest.mark.attack("a generation config cut short or senseless")
@pytest.mark.parametrize(
    "spoil", [truncate("generation_config.json"), entries("generation_config.json", eos_token_id=99)]
)
def test_a_policy_is_not_loaded_with_another_end_than_was_saved(tmp_path: Path, spoil) -> None:
    directory = make_gpt2(tmp_path / "checkpoint-3")
    assert load_policy(directory, "sound", "float32", "eager", "cpu").eos_token_ids
    spoil(directory)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_policy(directory, "spoilt", "float32", "eager", "cpu")


@pytest.mark.attack("code in training_args.bin")
def test_training_args_is_never_opened(sound: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    torch.save(RunsCode(witness), sound / "training_args.bin")
    read_checkpoint(sound)
    assert "training_args.bin" not in file_digests(sound)
    assert not witness.exists()


def test_a_run_directory_and_checkpoints_with_a_part_missing_are_refused_with_a_fix(sound: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run directory, with checkpoint-3 in it.*checkpoint-\*"):
        read_checkpoint(sound.parent)
    (sound / "optimizer.pt").unlink()
    (sound / "global_step3").mkdir()  # DeepSpeed's folder, but without optimizer states
    with pytest.raises(CheckpointError, match=r"no optimizer\.pt, and no optimizer state in the format .*Fix: save"):
        read_checkpoint(sound)
    (sound / "model.safetensors").rename(sound / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"convert pytorch_model\.bin to safetensors"):
        read_checkpoint(sound)


def test_weights_that_transformers_renames_are_left_to_it(sound: Path) -> None:
    tensors(lambda s: s.update({"decoder.embed.weight": s.pop(EMBEDDING)}))(sound)
    assert any("1 parameters under other names" in line for line in read_checkpoint(sound).assumptions)


def test_reading_changes_nothing(sound: Path) -> None:
    default = torch.get_default_dtype()
    before = file_digests(sound)
    read_checkpoint(sound).optimizer.moments["exp_avg"][EMBEDDING].zero_()  # writes to a private mapping, not the file
    assert torch.get_default_dtype() == default
    digests_of_files._known.clear()  # else the digests would come from the cache, and not from the files
    assert file_digests(sound) == before

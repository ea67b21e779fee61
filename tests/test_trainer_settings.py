"""What a checkpoint says of its trainer is taken over, held against the configuration, and never ignored."""

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_fixtures import make_base, make_lora
from pipeline_fixtures import NAMES, make_run, probe, skip_figures, values
from transformers import get_scheduler

from entropy_core.checkpoints.layout import find_layout
from entropy_core.checkpoints.schedule import UnknownScheduleError, factors_to_come
from entropy_core.checkpoints.trainer_files import TrainerFiles, read_trainer_files
from entropy_core.checkpoints.training_args import read_training_arguments
from entropy_core.config import trainer_fields as fields
from entropy_core.config.read import parse_config
from entropy_core.config.schema import ProbeConfig, VarianceRequest
from entropy_core.config.trainer_differences import LEFT_OUT
from entropy_core.errors import ConfigError
from entropy_core.pipeline.settings import OF_THE_TRAINING, Settled, settle, value_of, with_read
from entropy_core.pipeline.statistics import variance

trl = pytest.importorskip("trl")


def saved(folder: Path, kind: str = "GRPO", **settings: Any) -> TrainerFiles:
    """What is read of a trainer's settings that torch has saved."""
    own = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "loss_type": "grpo"}
    own |= {"per_device_train_batch_size": 16}
    if kind == "RLOO":
        del own["loss_type"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(getattr(trl, f"{kind}Config")(**own | settings), folder / "training_args.bin")
    return TrainerFiles(kind, read_training_arguments(folder / "training_args.bin").values)


def asked(**sections: Any) -> ProbeConfig:
    return parse_config({"checkpoints": ["run"], **sections})


def settled(folder: Path, config: ProbeConfig | None = None, kind: str = "GRPO", **settings: Any) -> Settled:
    return settle(config or asked(), {"checkpoint-1": saved(folder, kind, **settings)})


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GRPOConfig", "RLOOConfig"])
def test_every_setting_of_the_trainer_is_in_exactly_one_list(kind):
    """So that a release of TRL with a new one fails here, and nothing of it is left out in silence."""
    lists = [fields.SETTINGS, fields.OPTIMIZER, fields.MODELLED_AT, fields.NO_EFFECT]
    names = [field.name for field in dataclasses.fields(getattr(trl, kind))]
    assert len(names) > 100
    assert {name: sum(name in each for each in lists) for name in names} == dict.fromkeys(names, 1)


def test_the_keys_of_the_table_are_ours():
    keys = {*fields.SETTINGS.values(), *(rule.key for rule in fields.MODELLED_AT.values())}
    for key in (*(keys - {""}), *OF_THE_TRAINING):
        value_of(asked(), key)


def test_nothing_is_refused_of_a_trainer_that_was_left_as_it_is(tmp_path):
    """TRL's defaults, the KL term in the reward of RLOO among them."""
    for kind in ("GRPO", "RLOO"):
        found = settled(tmp_path, kind=kind)
        assert found.warnings == found.notes == ()


# --- what is read -----------------------------------------------------------------------------------------------------

READ = {
    "temperature": ({"temperature": 0.7}, "generation.temperature", 0.7),
    "length": ({"max_completion_length": 33}, "generation.max_new_tokens", 33),
    "group": ({"num_generations": 4}, "batch_config.G", 4),
    "clipping": ({"max_grad_norm": 0.2}, "update.max_grad_norm", 0.2),
    "no clipping": ({"max_grad_norm": 0}, "update.max_grad_norm", 0.0),
    "kl": ({"beta": 0.04, "use_bias_correction_kl": False}, "update.kl_beta", 0.04),
    "scaled": ({"scale_rewards": True}, "update.scale_rewards", "group"),
    "not scaled": ({"scale_rewards": False}, "update.scale_rewards", "none"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, "update.loss", "dr_grpo"),
    "dapo": ({"loss_type": "dapo"}, "update.loss", "dapo"),
    "bnpo": ({"loss_type": "bnpo"}, "update.loss", "bnpo"),
    "luspo": ({"loss_type": "luspo"}, "update.loss", "luspo"),
    "micro-batches": ({"loss_type": "bnpo", "gradient_accumulation_steps": 2}, "update.micro_batch", 16),
    "sapo": ({"loss_type": "sapo"}, "update.loss", "grpo"),
    "vespo": ({"loss_type": "vespo"}, "update.loss", "dapo"),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, "update.loss", "cispo"),
    "its cap": ({"loss_type": "cispo", "epsilon_high": 5.0}, "update.epsilon_high", 5.0),
    "its cap by default": ({"loss_type": "cispo"}, "update.epsilon_high", 0.2),
    "scaled by the batch": ({"scale_rewards": "batch"}, "update.scale_rewards", "batch"),
    "cut responses": ({"mask_truncated_completions": True}, "update.mask_truncated_completions", True),
    "high entropies": ({"top_entropy_quantile": 0.2}, "update.top_entropy_quantile", 0.2),
    "bonus": ({"entropy_coef": 0.01}, "update.entropy_coef", 0.01),
    "adaptive bonus": ({"use_adaptive_entropy": True, "entropy_coef": 0.01}, "update.entropy_coef", 0.01),
    "correction of the KL": ({"beta": 0.04}, "update.use_bias_correction_kl", True),
    "sequences": ({"importance_sampling_level": "sequence"}, "update.importance_sampling_level", "sequence"),
    "prompts": ({"per_device_train_batch_size": 32, "num_generations": 4}, "batch_config.B_U", 8),
    "accumulated": (
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 6, "num_generations": 4},
        "batch_config.B_U",
        12,
    ),
    "arguments of the template": (
        {"chat_template_kwargs": {"enable_thinking": False}},
        "batch_config.chat_template_kwargs",
        {"enable_thinking": False},
    ),
    "special tokens": ({}, "batch_config.add_special_tokens", True),
    "weights": ({"reward_weights": [1, 0.5]}, "update.reward_weights", [1.0, 0.5]),
    "normalised first": (
        {"multi_objective_aggregation": "normalize_then_sum"},
        "update.multi_objective_aggregation",
        "normalize_then_sum",
    ),
    "three steps of a generation": (
        {"per_device_train_batch_size": 16, "steps_per_generation": 3},
        "batch_config.B_U",
        2,
    ),
}


FOLLOWED = {"update": {"phase": {"follow": True}}}


def test_the_steps_of_a_rollout_are_read_where_they_are_followed(tmp_path):
    of_rollout = {"steps_per_generation": 8, "gradient_accumulation_steps": 2, "num_iterations": 3}
    clipping = {"epsilon": 0.1, "epsilon_high": 0.28, "delta": 4.0, "off_policy_mask_threshold": 0.5}
    constant = {"lr_scheduler_type": "constant"}
    found = settled(tmp_path, asked(**FOLLOWED), **of_rollout, **clipping, **constant)
    assert found.read["update.phase.minibatches"] == 4 and found.read["update.phase.epochs"] == 3
    assert {name: found.read[f"update.phase.{name}"] for name in clipping} == clipping
    assert found.read["batch_config.B_U"] == 16 * 8 // 8  # of a whole rollout
    assert found.warnings == ()
    phase = with_read(asked(**FOLLOWED), found.read).update.phase
    assert phase.follow and phase.steps == 12 and phase.delta == 4.0
    plain = settled(tmp_path, **of_rollout, **clipping, **constant)
    assert not any("phase" in key for key in plain.read) and plain.read["batch_config.B_U"] == 4
    assert len(plain.warnings) == 2  # of the later steps


def test_what_the_user_says_of_the_phase_is_held_against_the_trainer(tmp_path):
    config = asked(update={"phase": {"minibatches": 2, "epochs": 1, "follow": True}}, batch_config={"B_U": 8})
    found = settled(tmp_path, config, steps_per_generation=4, lr_scheduler_type="constant")
    said = " ".join(found.warnings)
    assert "`update.phase.minibatches` is 2 in the configuration, and 4 in training_args.bin" in said


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"loss_type": "sapo"}, "loss_type"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "steps_per_generation"),
    ],
)
def test_a_phase_that_is_not_modelled_is_refused(tmp_path, settings, name):
    settings = {"per_device_train_batch_size": 16} | settings
    with pytest.raises(ConfigError, match=rf"update.leave_out: \[{name}\]"):
        settled(tmp_path, asked(**FOLLOWED), **settings)


def test_a_checkpoint_within_a_rollout_is_said(tmp_path):
    for made, said in ((6, 0), (7, 1)):
        files = dataclasses.replace(saved(tmp_path, num_iterations=3), step=made)
        assert len(settle(asked(**FOLLOWED), {"checkpoint-1": files}).warnings) == said


# --- the learning rates of the steps to come --------------------------------------------------------------------------

SCHEDULES = {
    "linear": {},
    "cosine": {"warmup_steps": 7},
    "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 2}, "warmup_steps": 0.2},
    "polynomial": {"lr_scheduler_kwargs": '{"power": 2.0, "lr_end": 1e-5}'},
    "constant_with_warmup": {"warmup_ratio": 0.4, "warmup_steps": 0},
    "inverse_sqrt": {"warmup_steps": 2},
    "warmup_stable_decay": {"warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 12}},
}
MADE, TOTAL, BASE = 5, 20, 3e-3


def schedule_of(folder: Path, name: str, arguments: dict[str, Any], total: int = TOTAL) -> list[float]:
    """What a trainer leaves of a schedule at step `MADE`; returns the learning rates of all its steps."""
    kwargs = arguments.get("lr_scheduler_kwargs", {})
    kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    steps, share = arguments.get("warmup_steps", 0), arguments.get("warmup_ratio", 0)
    warmup = steps if steps >= 1 else math.ceil(total * (steps or share))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    schedule = get_scheduler(name, optimizer, warmup, total, kwargs)
    rates = []
    for step in range(total):
        if step == MADE:
            torch.save(schedule.state_dict(), folder / "scheduler.pt")
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": MADE, "max_steps": total}))
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rates_to_come_are_those_of_the_schedule(tmp_path, name):
    arguments = SCHEDULES[name] | {"lr_scheduler_type": name, "learning_rate": BASE}
    rates = schedule_of(tmp_path, name, arguments)
    found = factors_to_come(tmp_path, arguments, 10)
    assert found[0] == 1 and found == pytest.approx([rate / rates[MADE] for rate in rates[MADE : MADE + 10]], rel=1e-12)
    beyond = factors_to_come(tmp_path, arguments, TOTAL - MADE + 2)
    assert beyond[-3:] == pytest.approx([rates[-1] / rates[MADE]] * 3, rel=1e-12)  # as at the last of its steps


def test_a_schedule_that_is_not_that_of_the_file_is_not_believed(tmp_path):
    arguments = {"lr_scheduler_type": "linear", "learning_rate": BASE}
    assert factors_to_come(tmp_path, {"lr_scheduler_type": "constant"}, 3) == (1, 1, 1)  # needs no files
    with pytest.raises(UnknownScheduleError, match="missing"):
        factors_to_come(tmp_path, arguments, 3)
    schedule_of(tmp_path, "linear", {})
    for other, why in (
        ({}, "no training_args.bin"),
        (arguments | {"warmup_steps": 9}, "does not give"),
        (arguments | {"lr_scheduler_type": "reduce_lr_on_plateau"}, "depends on what"),
        (arguments | {"lr_scheduler_type": "mine"}, "cannot make"),
        (arguments | {"lr_scheduler_kwargs": {"cycles": 2}}, "cannot make"),
    ):
        with pytest.raises(UnknownScheduleError, match=why):
            factors_to_come(tmp_path, other, 3)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 1, "max_steps": TOTAL}))
    with pytest.raises(UnknownScheduleError, match="do not say the same step"):
        factors_to_come(tmp_path, arguments, 3)
    (tmp_path / "scheduler.pt").write_bytes(b"\x80\x04garbage")
    with pytest.raises(UnknownScheduleError, match="is of another scheduler"):
        factors_to_come(tmp_path, arguments, 3)


def test_a_phase_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="minibatches: of a phase that is not followed"):
        asked(update={"phase": {"minibatches": 8}})
    with pytest.raises(ConfigError, match="epsilon_high and interventions: of a phase that is not followed"):
        asked(update={"phase": {"epsilon_high": 0.3, "interventions": ["positives_only"]}})
    odd = asked(update={"phase": {"minibatches": 5, "follow": True}}, batch_config={"B_U": 4, "G": 4})
    with pytest.raises(ConfigError, match="minibatches is 5, and U has 16 responses"):
        settle(odd, {})
    low = asked(update={"phase": {"delta": 0.9, "follow": True}})
    with pytest.raises(ConfigError, match=r"delta is 0\.9"):
        settle(low, {})


@pytest.mark.parametrize("case", READ)
def test_a_setting_is_read_where_the_user_leaves_it_open(tmp_path, case):
    settings, key, value = READ[case]
    found = settled(tmp_path, **settings)
    assert found.read[key] == value and value_of(with_read(asked(), found.read), key) == value
    (source,) = [setting.source for setting in found.settings if setting.key == key]
    assert source.startswith("read from training_args.bin (")
    assert len(found.warnings) == ("steps_per_generation" in settings)


def test_the_number_of_processes_is_read_or_said_to_be_assumed(tmp_path):
    values = dict(saved(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2).arguments)

    def prompts(**changes: Any) -> tuple[Any, str]:
        found = settle(asked(), {"a": TrainerFiles("GRPO", values | changes)})
        return found.read["batch_config.B_U"], {s.key: s.source for s in found.settings}["batch_config.B_U"]

    assert prompts(distributed_state={"num_processes": 4}) == (
        8,
        "read from training_args.bin (8 responses × 2 accumulated × 4 processes / 8 per prompt)",
    )
    assert prompts(distributed_state=None, generation_batch_size=64, steps_per_generation=2)[0] == 8
    alone = prompts(distributed_state=None, generation_batch_size=None)
    assert alone[0] == 2 and "1 process, which is assumed" in alone[1]
    assert prompts(_n_gpu=2)[0] == 4


def test_a_step_on_one_prompt_is_for_the_user_to_settle(tmp_path):
    """TRL's own defaults make it; what differs from prompt to prompt cannot be estimated from one."""
    with pytest.raises(ConfigError, match=r"which is one prompt.*set batch_config\.B_U"):
        settled(tmp_path, per_device_train_batch_size=8)
    assert settled(tmp_path, asked(batch_config={"B_U": 8}), per_device_train_batch_size=8).warnings


def test_rloo(tmp_path):
    found = settled(tmp_path, kind="RLOO", beta=0.0, per_device_train_batch_size=4)
    assert found.read["update.loss"] == "rloo" and found.read["batch_config.G"] == 2
    assert "update.scale_rewards" not in found.read and "update.kl_beta" not in found.read
    more = {"normalize_advantages": True, "reward_clip_range": (-1.0, 1.0), "mask_truncated_completions": True}
    found = settled(tmp_path, kind="RLOO", beta=0.05, **more)
    assert {key: found.read[f"update.{key}"] for key in ("kl_beta", "kl_in", *more)} == {
        "kl_beta": 0.05,
        "kl_in": "reward",
        **(more | {"reward_clip_range": [-1.0, 1.0]}),
    }


# --- what is not modelled ---------------------------------------------------------------------------------------------

REFUSED = {
    "top_p": {"top_p": 0.95},
    "top_k": {"top_k": 50},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "generation_kwargs": {"generation_kwargs": {"suppress_tokens": [3]}},
    "sync_ref_model": {"beta": 0.04, "use_bias_correction_kl": False, "sync_ref_model": True},
    "delta": {"delta": 0.9},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "router_aux_loss_coef": {"router_aux_loss_coef": 0.01},
    "per_device_train_batch_size": {"per_device_train_batch_size": 12, "steps_per_generation": 2},
    "vllm_structured_outputs_regex": {"vllm_structured_outputs_regex": "[0-9]+"},
}
WARNED = {
    "num_iterations": {"num_iterations": 2},
    "steps_per_generation": {"steps_per_generation": 4},
    "use_vllm": {"use_vllm": True},
    "max_tool_calling_iterations": {"max_tool_calling_iterations": 3},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_modelled_is_refused_by_name_unless_the_user_leaves_it_out(tmp_path, case):
    settings, name = REFUSED[case], case
    with pytest.raises(ConfigError, match=f"would not be the trainer's.*{name}|no whole number") as refused:
        settled(tmp_path, **settings)
    assert f"update.leave_out: [{name}]" in refused.value.fix and "\n" not in str(refused.value)
    found = settled(tmp_path, asked(update={"leave_out": [name]}), **settings)
    assert len(found.warnings) == 1 + (name == "per_device_train_batch_size")
    assert name in LEFT_OUT


@pytest.mark.parametrize("case", WARNED)
def test_what_is_close_is_warned_of(tmp_path, case):
    (warning,) = settled(tmp_path, **WARNED[case]).warnings
    assert case in warning and warning.endswith(".")


def test_a_step_on_an_older_rollout_is_told_from_the_first_on_it(tmp_path):
    files = saved(tmp_path, num_iterations=3, gradient_accumulation_steps=2)
    at = {f"checkpoint-{step}": dataclasses.replace(files, step=step) for step in (6, 7, 8)}
    found = settle(asked(), at)
    assert [one.rpartition("; ")[2] for one in found.warnings] == [
        "the next one is number 2 of the 3 on its rollout (checkpoint-7).",
        "the next one is number 3 of the 3 on its rollout (checkpoint-8).",
    ]
    assert [one for one in found.notes if "number 1 of the 3 on its rollout (checkpoint-6)" in one]
    parts = saved(tmp_path, steps_per_generation=4, num_iterations=2)
    (first, second) = settle(asked(), {"a": dataclasses.replace(parts, step=9)}).warnings
    assert "num_iterations = 2" in first and "number 2 of the 8" in first and "number 2 of the 8" in second


def test_tools_are_refused_by_name(tmp_path):
    files = dataclasses.replace(saved(tmp_path), log=({"step": 1, "tools/call_frequency": 0.5},))
    with pytest.raises(ConfigError, match="calls of tools") as refused:
        settle(asked(), {"a": files})
    assert "update.leave_out: [tools]" in refused.value.fix
    assert len(settle(asked(update={"leave_out": ["tools"]}), {"a": files}).warnings) == 1
    never = dataclasses.replace(files, log=({"step": 1, "tools/call_frequency": 0.0},))
    assert settle(asked(), {"a": never}).warnings == ()


def test_several_are_refused_together(tmp_path):
    with pytest.raises(ConfigError) as refused:
        settled(tmp_path, delta=0.9, top_k=20)
    assert refused.value.fact.count("\n  ") == 2 and "[top_k, delta]" in refused.value.fix


def test_an_own_setting_in_the_place_of_one_that_is_not_modelled_is_enough(tmp_path):
    settled(tmp_path, asked(generation={"top_p": 1.0}), top_p=0.9)
    unknown = dict(saved(tmp_path).arguments) | {"loss_type": "brand_new"}
    with pytest.raises(ConfigError, match=r"loss_type = 'brand_new'.*not modelled.*set update\.loss"):
        settle(asked(), {"a": TrainerFiles("GRPO", unknown)})
    (warning,) = settle(asked(update={"loss": "grpo"}), {"a": TrainerFiles("GRPO", unknown)}).warnings
    assert "brand_new" in warning


def test_what_can_be_left_out_has_a_name(tmp_path):
    with pytest.raises(ConfigError, match="leave_out names colour"):
        settled(tmp_path, asked(update={"leave_out": ["colour"]}))


def test_a_bonus_that_is_not_at_work_in_the_next_step_is_no_difference(tmp_path):
    arguments = saved(tmp_path, use_adaptive_entropy=True, entropy_target=0.2).arguments
    above = TrainerFiles("GRPO", arguments, entropy_control={"entropy_coef": 0.1, "last_world_entropy": 0.3})
    assert settle(asked(), {"a": above}).warnings == ()
    assert settle(asked(), {"a": above}).read["update.entropy_coef"] == 0
    below = dataclasses.replace(above, entropy_control={"entropy_coef": 0.1, "last_world_entropy": 0.1})
    assert settle(asked(), {"a": below}).read["update.entropy_coef"] == 0.1


def test_what_generate_takes_from_the_model_counts_too(tmp_path):
    arguments = saved(tmp_path).arguments
    of_model = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1], "suppress_tokens": [5]}
    with pytest.raises(ConfigError, match=r"generation_config\.json has suppress_tokens = \[5\]"):
        settle(asked(), {"a": TrainerFiles("GRPO", arguments, of_model)})
    del of_model["suppress_tokens"]  # of the others TRL says its own
    assert settle(asked(), {"a": TrainerFiles("GRPO", arguments, of_model)}).warnings == ()


def test_what_nobody_knows_is_said(tmp_path):
    arguments = saved(tmp_path).arguments | {"brand_new": 1, "_private": 2}
    rewards = ("length", "accuracy")
    files = TrainerFiles("GRPO", arguments, rewards=rewards, dropout={"config.json: attn_pdrop": 0.1})
    said = settle(asked(), {"a": files}).warnings
    assert ["length, accuracy" in said[0], "brand_new" in said[1], "attn_pdrop = 0.1" in said[2], len(said)] == [
        *([True] * 3),
        3,
    ]
    both = asked(update={"reward": ["arithmetic", "exact_match"]})
    assert not any("accuracy" in one for one in settle(both, {"a": files}).warnings)
    quiet = dataclasses.replace(files, arguments=saved(tmp_path, disable_dropout=True).arguments, rewards=())
    assert settle(asked(), {"a": quiet}).warnings == ()
    (other,) = settle(asked(), {"a": TrainerFiles("SFTConfig", {"max_grad_norm": 0.3, "beta": 9})}).warnings
    assert "SFTConfig" in other


def test_a_quantised_base_that_another_one_stands_for_is_said(tmp_path):
    base = make_base(tmp_path / "base")
    checkpoint = make_lora(tmp_path / "checkpoint-3", base)
    path = checkpoint / "adapter_config.json"
    assert read_trainer_files(find_layout(checkpoint)).quantised_base == ""
    for name in ("unsloth/Qwen3-8B-bnb-4bit", str(tmp_path / "narrow")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
        (tmp_path / "narrow").mkdir(exist_ok=True)
        (tmp_path / "narrow" / "config.json").write_text('{"quantization_config": {"bits": 4}}')
        files = read_trainer_files(find_layout(checkpoint, base))
        assert files.quantised_base == name and files.is_adapter
        assert name in settle(asked(), {"a": files}).warnings[-1]


# --- a sweep ----------------------------------------------------------------------------------------------------------


def test_a_sweep_takes_what_is_read_and_its_report_says_so(tmp_path, monkeypatch):
    """What is read and what is set to the same are the same results; another value is a warning above all."""
    skip_figures(monkeypatch)
    run = make_run(tmp_path / "run")
    for name in NAMES:
        saved(run / name, temperature=0.9, max_completion_length=8, num_generations=4, loss_type="dr_grpo")
    own: dict[str, Any] = {"batch_config": {"E_total_sequences": 8}, "generation": {}, "update": {}}
    given: dict[str, Any] = values(run, tmp_path / "artifacts", checkpoints=[str(run)], update={"reward": "arithmetic"})
    read = probe(given | own | {"update": given["update"]})
    assert read.run.inputs("sample-e-batch")["max_new_tokens"] == 8
    assert read.run.inputs("compute-update")["loss"].name == "dr_grpo"
    assert read.run.inputs("score-e-batch")["policy"].temperature == 0.9
    page = (read.result.run_directory / "report.md").read_text()
    assert "**Warning:**" not in page
    assert "| `generation.temperature` | `0.9` | read from training_args.bin (temperature) |" in page
    assert '| `update.reward` | `"arithmetic"` | set by you |' in page

    same = {"batch_config": {"E_total_sequences": 8, "B_U": 4, "G": 4}, "update": given["update"] | {"loss": "dr_grpo"}}
    again = probe(given | same | {"generation": {"temperature": 0.9, "max_new_tokens": 8}})
    assert again.run.was_computed == {"report": 1}

    other = probe(given | own | {"update": given["update"], "generation": {"temperature": 1.0}})
    page = (other.result.run_directory / "report.md").read_text().splitlines()
    assert page[2].startswith(
        "> **Warning:** `generation.temperature` is 1.0 in the configuration, and 0.9 in training"
    )
    changed = variance(
        VarianceRequest(run=other.result.run_id, artifacts=str(tmp_path / "artifacts"), confidence_level=0.5),
        other.run.store,
        other.run,
    )
    assert page[2] in (changed.run_directory / "report.md").read_text()  # also where no checkpoint is read again


# --- precedence -------------------------------------------------------------------------------------------------------


def test_the_configuration_wins_and_a_contradiction_is_said(tmp_path):
    config = asked(generation={"temperature": 1.0}, batch_config={"G": 8})
    found = settled(tmp_path, config, temperature=0.7, max_completion_length=99)
    result = with_read(config, found.read)
    assert (result.generation.temperature, result.generation.max_new_tokens) == (1.0, 99)
    (warning,) = found.warnings
    assert warning.startswith("`generation.temperature` is 1.0 in the configuration, and 0.7 in training_args.bin")
    sources = {setting.key: setting.source for setting in found.settings}
    assert sources["generation.temperature"] == "set by you"
    assert sources["batch_config.G"] == "set by you, as training_args.bin (num_generations) says"
    assert sources["generation.max_new_tokens"] == "read from training_args.bin (max_completion_length)"
    assert sources["batch_config.dataset_name"] == sources["update.reward"] == "assumed"
    assert sources["update.learning_rate"] == "read from optimizer.pt"
    assert with_read(result, found.read) == result  # once is as good as twice
    assert settled(tmp_path, asked(update={"scale_rewards": "auto"})).warnings == ()  # which divides under grpo


def test_nothing_is_read_where_nothing_is_said():
    found = settle(asked(), {"a": TrainerFiles()})
    assert found.read == {} and found.warnings == ()
    assert {setting.source for setting in found.settings} == {"assumed", "read from optimizer.pt"}


def test_checkpoints_that_disagree_are_refused_unless_the_user_settles_it(tmp_path):
    first, second = (saved(tmp_path, temperature=t, max_completion_length=n) for t, n in ((1.0, 8), (0.7, 16)))
    of_each = {"checkpoint-1": first, "checkpoint-2": second, "checkpoint-3": TrainerFiles()}
    with pytest.raises(ConfigError, match="not all trained with the same settings") as refused:
        settle(asked(), of_each)
    assert "generation.temperature: 1.0 (checkpoint-1), 0.7 (checkpoint-2)" in str(refused.value)
    assert "max_new_tokens: 8 (checkpoint-1), 16 (checkpoint-2)" in str(refused.value)
    found = settle(asked(generation={"temperature": 1.0, "max_new_tokens": 8}), of_each)
    assert found.warnings[0].endswith("and 0.7 in training_args.bin (temperature) of checkpoint-2.")
    assert found.warnings[-1].startswith("checkpoint-3: nothing says how it was trained")
    assert settle(asked(), {"checkpoint-1": first, "checkpoint-3": TrainerFiles()}).read["batch_config.G"] == 8


def test_a_value_that_is_none_of_ours_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"what the configuration and the checkpoints say: generation\.temperature"):
        settled(tmp_path, temperature=0.0)


def test_what_was_given_survives_another_process():
    config = asked(generation={"temperature": 0.5}, update={"reward": "arithmetic"})
    again = parse_config(json.loads(json.dumps(config.as_given())))
    assert again == config
    assert again.generation.model_fields_set == {"temperature"} and again.update.model_fields_set == {"reward"}

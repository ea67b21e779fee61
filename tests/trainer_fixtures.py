"""A step that TRL's trainer takes, and the step that the probe predicts for the same batch.

The trainer saves a checkpoint, draws responses, scores them, and steps; the probe reads the checkpoint and the settings
in it, is given these responses and rewards in the place of its own U batch, and predicts v. The change of the saved
weights is lr·v.
"""

import importlib.util
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
import torch
from pipeline_fixtures import SHAPE, Counting, parts_of, values, write_reward
from safetensors.torch import load_file
from torch import Tensor
from trainer_models import MODELS, same_after_rounding

from entropy_core.checkpoints.adapter_files import PEFT_PREFIX
from entropy_core.checkpoints.tokenizer import load_tokenizer
from entropy_core.config.read import parse_config
from entropy_core.demo.run import build_model, build_tokenizer
from entropy_core.demo.training_run import ON_A_CPU, quiet
from entropy_core.numerics import ragged
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import direct_runner
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.policy.pretrained import load_policy
from entropy_core.prompts.arithmetic import problems
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.files import write_sequences
from entropy_core.store.artifact import Artifact, Writer
from entropy_core.store.store import Stage, Store

trl = pytest.importorskip("trl")

PROMPTS, G = 6, 4
STEPS = 3  # of which the last is predicted
MAX_NEW_TOKENS = 8


def low_digits(completions: list[str], **_: Any) -> list[float]:
    """An untrained policy gets different amounts of it."""
    return [sum(c in "01234" for c in text) / 4 for text in completions]


class Batch(NamedTuple):
    """What one optimizer step was taken on: plain lists, so that they can be the inputs of a stage."""

    prompts: list[list[int]]
    responses: list[list[int]]
    truncated: list[bool]
    rewards: list[float]  # of the first function
    of_each: list[list[float | None]]  # by response, of all functions
    ends: list[int]  # tokens that end a response


class Own(NamedTuple):
    """Prompts, tokenizer and rewards of a run, of which the probe is given the files and makes the same itself."""

    rewards: Sequence[str] = ("low_digits",)  # functions of `tests/trainer_rewards.py`
    tokenizer: Callable[[Any], Any] = lambda tokenizer: tokenizer
    rows: Sequence[dict[str, Any]] | None = None
    ends: Sequence[int] = ()  # of the generation config


REWARDS = Path(__file__).with_name("trainer_rewards.py")


def reward_functions(names: Sequence[str]) -> list[Callable[..., Any]]:
    """Functions of `tests/trainer_rewards.py`, for the trainer; the probe is given the file."""
    spec = importlib.util.spec_from_file_location("trainer_rewards", REWARDS)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [getattr(module, name) for name in names]


def train(
    run: Path,
    model: Any,
    peft_config: Any = None,
    kind: str = "GRPO",
    own: Own | None = None,
    more: Any = None,
    **settings: Any,
) -> list[Batch]:
    """A few steps of TRL with a checkpoint after each; returns the batch of each step, or of each rollout."""
    from datasets import Dataset
    from transformers import PrinterCallback

    batches: list[Batch] = []

    class Recording(getattr(trl, f"{kind}Trainer")):  # type: ignore[misc]
        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Tensor:
            self.responses = completion_ids  # those that are cut too, which may be masked later
            self.found = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
            return self.found

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            out = super()._generate_and_score_completions(inputs)
            rows = zip(out["prompt_ids"], out["prompt_mask"], strict=True)
            prompts = [row[mask.bool()].tolist() for row, mask in rows]
            truncated = [ids[-1] not in self.eos_token_ids for ids in self.responses]
            of_each = [[None if value != value else value for value in row] for row in self.found.tolist()]
            first = self.found[:, 0].nan_to_num().tolist()
            responses = [*map(list, self.responses)]
            batches.append(Batch(prompts, responses, truncated, first, of_each, sorted(self.eos_token_ids)))
            return out

    given = {
        "per_device_train_batch_size": PROMPTS * G,
        "num_generations": G,
        "max_completion_length": MAX_NEW_TOKENS,
        "max_steps": STEPS,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        **ON_A_CPU,
        "seed": 3,
    }
    dataset = Dataset.from_list(problems("train", 64)).select_columns(["prompt"])
    if own and own.rows:
        dataset = Dataset.from_list([*own.rows])
    with (
        torch.random.fork_rng(devices=[]),
        quiet(threads=1),
        warnings.catch_warnings(),
        pytest.MonkeyPatch.context() as patch,
    ):
        warnings.simplefilter("ignore")  # PEFT's and TRL's advice
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
        given |= {"loss_type": "grpo"} if kind == "GRPO" else {}
        config = getattr(trl, f"{kind}Config")(output_dir=str(run), **given | settings)
        tokenizer = own.tokenizer(build_tokenizer()) if own else build_tokenizer()
        functions = reward_functions(own.rewards) if own else low_digits
        trainer = Recording(
            model,
            functions,
            config,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            **more or {},
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    accumulated = settings.get("gradient_accumulation_steps", 1)
    of_rollout = settings.get("num_iterations", 1) * settings.get("steps_per_generation", accumulated) // accumulated
    assert len(batches) == -(-settings.get("max_steps", STEPS) // of_rollout)
    return batches


def recorded_sequences(
    out: Writer,
    execution: Any,
    *,
    prompts: list[list[int]],
    responses: list[list[int]],
    truncated: list[bool],
    prompt_ids: list[int],
    texts: list[str],
) -> dict[str, Any]:
    """What sample-u-batch leaves, of responses that were drawn elsewhere."""
    count = len(prompts)

    def offsets(rows: list[list[int]]) -> Tensor:
        return ragged.offsets_from_lengths(torch.tensor([len(row) for row in rows]))

    ids_N, reasons = torch.arange(count), ["length" if cut else "eos" for cut in truncated]
    write_sequences(
        out,
        BatchedSequences(
            sequence_ids_N=ids_N,
            prompt_ids_N=torch.tensor(prompt_ids),
            draws_N=ids_N % G,
            prompt_tokens=torch.tensor([token for row in prompts for token in row]),
            prompt_offsets_N1=offsets(prompts),
            response_tokens_K=torch.tensor([token for row in responses for token in row]),
            response_offsets_N1=offsets(responses),
            finish_reasons=tuple(reasons),
        ),
    )
    table = {
        "sequence_id": ids_N.tolist(),
        "prompt_id": prompt_ids,
        "draw": (ids_N % G).tolist(),
        "response": texts,
        "length": [len(row) for row in responses],
        "finish_reason": reasons,
    }
    out.table(pa.table(table), "sequences.parquet")
    return {"sequences": count}


def recorded_rewards(out: Writer, execution: Any, *, rewards: list[float]) -> dict[str, Any]:
    """What reward-u-batch leaves."""
    ids = list(range(len(rewards)))
    out.table(pa.table({"sequence_id": ids, "prompt_id": [i // G for i in ids], "reward": rewards}), "rewards.parquet")
    return {"sequences": len(rewards)}


class Recorded(Counting):
    """A runner that takes U from the trainer."""

    batch: Batch
    tokenizer: Any = None  # of a run whose rewards the probe computes itself

    def note(self, stage: Stage, inputs: dict[str, Any], label: str) -> Artifact:
        prompts, responses, truncated, rewards, *_ = self.batch
        if stage.name == "sample-u-batch":
            stage = Stage(stage.name, recorded_sequences)
            ids, texts = [i // G for i in range(len(prompts))], [""] * len(prompts)
            if self.tokenizer is not None:
                pool = inputs["prompts"].table("prompt_tokens.parquet")["token_ids"].to_pylist()
                ids = [pool.index(tokens) for tokens in prompts]  # the probe's own tokens are the trainer's
                texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
            inputs = {"prompts": prompts, "responses": responses, "truncated": truncated}
            inputs |= {"prompt_ids": ids, "texts": texts}
        elif stage.name == "reward-u-batch" and self.tokenizer is None:
            stage, inputs = Stage(stage.name, recorded_rewards), {"rewards": rewards}
        artifact = direct_runner(self.store, self.execution)(stage, inputs, label)
        self.asked.append((stage.name, inputs, artifact))
        return artifact


def predicted(home: Path, batch: Batch, own: Own | None = None) -> tuple[Artifact, float, dict[str, dict[str, Tensor]]]:
    """compute-update on the trainer's batch, the learning rate of the step, and its parts; told nothing but the run."""
    asked = values(
        home / "run",
        home / "artifacts",
        checkpoints=[str(home / "run" / f"checkpoint-{STEPS - 1}")],
        policy={"dtype": "float32"},
        update={"reward": write_reward(home)},
        importance={"etas": [0]},
        execution={"shard_size": PROMPTS * G},
    )
    del asked["generation"]["max_new_tokens"]
    asked["batch_config"] = {"E_total_sequences": 4}
    if own:
        asked["update"]["reward"] = [f"{REWARDS}:{name}" for name in own.rewards]
        if own.rows:
            (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own.rows))
            asked["batch_config"]["dataset_name"] = str(home / "prompts.jsonl")
    config = parse_config(asked)
    checkpoints = preflight(config)
    assert all(warning.startswith("Dropout was on") for warning in checkpoints[0].warnings)
    store = Store(config.store_root)
    run = Recorded(store, execution_for(config, checkpoints))
    run.batch = batch
    if own:
        of = checkpoints[0]
        run.tokenizer = load_tokenizer(of.paths[of.tokenizer])
        base = of.paths[of.base] if of.base else None
        policy = load_policy(of.paths[of.weights], "weights", "float32", "eager", "cpu", base)
        assert list(policy.eos_token_ids) == batch.ends
    sweep(config, checkpoints, store, run)
    if own:
        (rewarded,) = run.artifacts("reward-u-batch")
        table, count = rewarded.table("rewards.parquet"), len(own.rewards)
        names = [f"reward_{number + 1}" for number in range(count)] if count > 1 else ["reward"]
        for number, name in enumerate(names):
            theirs = [row[number] for row in batch.of_each]
            assert table[name].to_pylist() == [None if one is None else pytest.approx(one, rel=1e-6) for one in theirs]
    (done,), (loaded,) = run.artifacts("compute-update"), run.artifacts("load-checkpoint")
    return done, loaded.summary["learning_rate"], parts_of(done, run)


def compare(change: dict[str, Tensor], step: dict[str, Tensor]) -> tuple[float, float]:
    """Cosine and ratio of norms of two steps over all parameters."""
    assert change.keys() == step.keys()
    a, b = (torch.cat([x[name].double().flatten() for name in sorted(change)]) for x in (change, step))
    return float(a @ b / (a.norm() * b.norm())), float(a.norm() / b.norm())


def weights(directory: Path) -> dict[str, Tensor]:
    """The trained parameters that a checkpoint holds, by the probe's names."""
    adapter = directory / "adapter_model.safetensors"
    if not adapter.exists():  # experts are stored under other names than they have
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
        return {name: parameter.detach() for name, parameter in model.named_parameters()}
    stored = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(adapter).items()}
    return {
        name: tensor
        for name, tensor in stored.items()
        if "original_module" not in name and ".modules_to_save." not in name
    }


def as_stored(name: str) -> str:
    """Saved files leave out the adapter's name."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "lora_dropout": 0.0}


def held_against_the_trainer(
    home: Path, settings: dict[str, Any]
) -> tuple[tuple[float, float], tuple[float, float], Artifact, float, float]:
    """Train a tiny policy and predict its last step.

    Args:
        home: a folder to work in.
        settings: of the trainer; `kind` is GRPO or RLOO; with `lora`, further settings of an adapter; with `own`, the
            run's own prompts, tokenizer and rewards; `model` is one of `trainer_models.MODELS`.

    Returns:
        Cosine and ratio of norms of the predicted step and the real one; the same without the gradient; compute-update;
        the learning rate; and of the weights that move the share that moves to the same number of their dtype.
    """
    settings = dict(settings)
    lora, own = settings.pop("lora", None), settings.get("own")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice
        made, more = MODELS[settings.pop("model")](home) if "model" in settings else (build_model(SHAPE), {})
    model, peft_config = made, None
    if own and own.ends:
        model.generation_config.eos_token_id = list(own.ends)
    if lora is not None:
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM

        model.save_pretrained(home / "base")
        (own.tokenizer(build_tokenizer()) if own else build_tokenizer()).save_pretrained(home / "base")
        model = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
        peft_config = LoraConfig(task_type="CAUSAL_LM", **LORA | lora)
    batches = train(home / "run", model, peft_config, more=more, **settings)
    done, lr, parts = predicted(home, batches[-1], own)
    before, after = (weights(home / "run" / f"checkpoint-{step}") for step in (STEPS - 1, STEPS))
    change = {name: after[name].double() - before[name].double() for name in before}
    step = {as_stored(name): lr * v.double() for name, v in done.vector("direction").items()}
    momentum, decay = (parts[name] for name in ("momentum", "decay"))
    without_g = {as_stored(name): lr * (momentum[name] + decay[name]) for name in momentum}
    same = same_after_rounding(before, after, step)
    return compare(change, step), compare(change, without_g), done, lr, same

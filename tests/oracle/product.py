"""A scenario as a run of the product: a checkpoint, a pool and a reward, swept by every stage."""

import json
from pathlib import Path
from typing import Any

import torch
from pipeline_fixtures import Counting, Probe, probe
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from entropy_core.sequences.files import read_sequences
from entropy_core.store.artifact import Artifact
from oracle.policies import in_float64
from oracle.replicas import ETAS, Laboratory, Trainer
from oracle.scenarios import Ready

LETTERS = "abcdefgh"
REWARD = '''"""What a response is worth, by a table."""

import json
from pathlib import Path

TABLE = json.loads(Path(__file__).with_name("rewards.json").read_text())


def worth(prompts, completions, **_):
    return [TABLE[f"{prompt} {completion}"] for prompt, completion in zip(prompts, completions, strict=True)]
'''


def _text(tokens: list[int] | tuple[int, ...]) -> str:
    return "".join(LETTERS[token] for token in tokens)


def write_run(folder: Path, ready: Ready) -> Path:
    """A trainer's directory with the policy and the optimizer of a scenario, a pool and a reward beside it."""
    exact, trainer = ready.laboratory.exact, ready.trainer
    checkpoint = folder / "run" / "checkpoint-7"
    model = exact.policy.model
    model.save_pretrained(checkpoint)
    vocabulary = {LETTERS[token]: token for token in range(exact.vocabulary)}
    characters = Tokenizer(models.WordLevel(vocabulary))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    end = LETTERS[exact.vocabulary - 1]
    PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False
    ).save_pretrained(checkpoint)
    beta1, beta2, eps, decay, *_ = trainer.hyperparameters
    parameters = exact.parameters
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=ready.learning_rate, betas=(beta1, beta2), eps=eps, weight_decay=decay
    )
    moments = [exact.direction(moment_Q) for moment_Q in trainer.state[1:3] if moment_Q is not None]
    for name, parameter in parameters.items():
        first, second = (moment[name].clone() for moment in moments)
        step = torch.tensor(float(trainer.state.step))
        optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    pool = "\n".join(json.dumps({"prompt": _text(prompt)}) for prompt in exact.prompts)
    (folder / "pool.jsonl").write_text(pool)
    rewards = {
        f"{_text(exact.prompts[p])} {_text(response).removesuffix(end)}": float(reward)
        for (p, response), reward in zip(exact.texts, trainer.reward_R, strict=True)
    }
    (folder / "rewards.json").write_text(json.dumps(rewards))
    (folder / "reward.py").write_text(REWARD)
    return folder


def configuration(folder: Path, ready: Ready) -> dict[str, Any]:
    """The sweep of a scenario, in which U has every prompt of the pool once."""
    scenario, trainer = ready.scenario, ready.trainer
    return {
        "name": "oracle",
        "checkpoints": [str(folder / "run" / "checkpoint-*")],
        "policy": {"dtype": scenario.dtype},
        "batch_config": {
            "E_total_sequences": scenario.of_e,
            "B_U": scenario.prompts,
            "G": scenario.G,
            "dataset_name": str(folder / "pool.jsonl"),
        },
        "generation": {"max_new_tokens": scenario.longest, "temperature": scenario.temperature},
        "update": {
            "loss": scenario.loss,
            "reward": f"{folder / 'reward.py'}:worth",
            "max_grad_norm": trainer.max_norm,
        },
        "importance": {"etas": list(ETAS), "estimators": ["per_decision"]},
        "variance": {"normalizations": [scenario.normalization]},
        "execution": {"artifacts": str(folder / "artifacts"), "device": "cpu"},
    }


def swept(folder: Path, ready: Ready) -> Probe:
    """The sweep."""
    with in_float64(ready.laboratory.exact.policy.dtype):
        return probe(configuration(write_run(folder, ready), ready))


def numbers(laboratory: Laboratory, run: Counting, stage: str) -> Tensor:
    """Which responses a batch of the sweep has, by their numbers in the tables."""
    number = {text: i for i, text in enumerate(laboratory.exact.texts)}
    shards: list[Artifact] = run.artifacts(stage)
    return torch.tensor(
        [
            number[int(shard.prompt_ids_N[i]), tuple(shard.response(i).tolist())]
            for shard in map(read_sequences, shards)
            for i in range(len(shard))
        ]
    )


def from_tables(ready: Ready, run: Counting) -> list[dict[str, Any]]:
    """The rows of the same batches by way of the tables."""
    laboratory, scenario = ready.laboratory, ready.scenario
    trainer: Trainer = ready.trainer._replace(prompts=scenario.prompts)
    e_N, u_N = (numbers(laboratory, run, f"sample-{batch}-batch") for batch in ("e", "u"))
    return laboratory.rows(trainer, laboratory.step(trainer, u_N), e_N, ready.learning_rate).rows

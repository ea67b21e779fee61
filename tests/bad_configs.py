"""Bad configurations: those that the form's schema refuses, and those that make a run which fails before any stage."""

from pathlib import Path
from typing import Any, NamedTuple

from pipeline_fixtures import NAMES, values


class Bad(NamedTuple):
    """A change of a good configuration, and words of what is said about it."""

    change: dict[str, Any]
    said: str


REFUSED = {
    "an unknown section": Bad({"colour": "red"}, "colour"),
    "an unknown key": Bad({"batch_config": {"B_V": 4}}, "B_V"),
    "code of the hub": Bad({"policy": {"trust_remote_code": True}}, "trust_remote_code"),
    "no checkpoints": Bad({"checkpoints": []}, "checkpoints"),
    "checkpoints that are no list": Bad({"checkpoints": "run/checkpoint-3"}, "checkpoints"),
    "a name with a space": Bad({"name": "my run"}, "name"),
    "a section that is a list": Bad({"generation": [64]}, "generation"),
    "a precision without derivatives": Bad({"policy": {"dtype": "bfloat16"}}, "policy.dtype"),
    "another attention": Bad({"policy": {"attn_implementation": "sdpa"}}, "policy.attn_implementation"),
    "another mode": Bad({"batch_config": {"E_sampling_mode": "greedy"}}, "batch_config.E_sampling_mode"),
    "one sequence": Bad({"batch_config": {"E_total_sequences": 1}}, "batch_config.E_total_sequences"),
    "half a sequence": Bad({"batch_config": {"E_total_sequences": 16.5}}, "batch_config.E_total_sequences"),
    "a number in words": Bad({"batch_config": {"B_U": "many"}}, "batch_config.B_U"),
    "groups of a billion": Bad({"batch_config": {"G": 10**9}}, "batch_config.G"),
    "two sizes": Bad({"batch_config": {"B_E_values": [4, 8]}}, "batch_config.B_E_values"),
    "a negative seed": Bad({"batch_config": {"E_batch_seed": -1}}, "batch_config.E_batch_seed"),
    "temperature zero": Bad({"generation": {"temperature": 0}}, "generation.temperature"),
    "a nucleus": Bad({"generation": {"top_p": 0.95}}, "top_p"),
    "greedy": Bad({"generation": {"do_sample": False}}, "generation.do_sample"),
    "an unknown loss": Bad({"update": {"loss": "ppo"}}, "update.loss"),
    "a negative norm": Bad({"update": {"max_grad_norm": -1}}, "update.max_grad_norm"),
    "a step size twice": Bad({"importance": {"etas": [0, 1, 1]}}, "etas|importance"),
    "an unknown estimator": Bad({"importance": {"estimators": ["is"]}}, "importance.estimators"),
    "95 for 0.95": Bad({"variance": {"confidence_level": 95}}, "variance.confidence_level"),
    "empty shards": Bad({"execution": {"shard_size": 0}}, "execution.shard_size"),
}
FAILED = {
    "no such checkpoint": Bad({"checkpoints": ["RUN/checkpoint-9*"]}, "no directory matches .*checkpoint-9"),
    "a folder for a checkpoint": Bad({"checkpoints": ["RUN/.."]}, r"has no config\.json"),
    "an unknown dataset": Bad({"batch_config": {"dataset_name": "gsm9k"}}, "unknown dataset 'gsm9k'"),
    "a missing file": Bad({"batch_config": {"dataset_name": "/no/such/pool.jsonl"}}, "no file /no/such/pool.jsonl"),
    "a missing split": Bad({"batch_config": {"U_split": "dev"}}, "no split 'dev'"),
    "a missing column": Bad({"batch_config": {"prompt_column": "question"}}, "no string in column 'question'"),
    "a pool that is too small": Bad({"batch_config": {"B_U": 513}}, "B_U asks for 513 distinct prompts"),
    "one prompt": Bad(
        {"batch_config": {"E_sampling_mode": "distinct", "B_E_values": [1]}}, "a standard error needs two"
    ),
    "a GPU that is not there": Bad({"execution": {"device": "cuda"}}, r"execution\.device is cuda, .* finds no GPU"),
    "shards beyond number": Bad(
        {"batch_config": {"E_total_sequences": 10_000_000}, "execution": {"shard_size": 1}},
        "30000016 shards of 1 sequences per checkpoint, .*shard_size to at least 6001",
    ),
    "two writers": Bad({"batch_config": {"apply_chat_template": True, "add_special_tokens": True}}, "special tokens"),
    "an unknown reward": Bad({"update": {"reward": "no.such:reward"}}, r"no\.such:reward"),
    "a reference without KL": Bad({"update": {"reference": "."}}, "Set kl_beta"),
    "KL to nobody": Bad({"update": {"kl_beta": 0.1}}, r"set update\.reference"),
    "a scale without groups": Bad({"update": {"loss": "reinforce", "scale_rewards": "group"}}, "scale_rewards: auto"),
    "a fresh optimizer without a rate": Bad({"update": {"optimizer_state": "fresh"}}, "Set learning_rate"),
    "a base without adapters": Bad({"policy": {"base_model": "."}}, "no checkpoint is an adapter"),
}
BAD = REFUSED | FAILED


def config_of(home: Path, change: dict[str, Any]) -> dict[str, Any]:
    run = home / "run"
    if isinstance(patterns := change.get("checkpoints"), list):
        change = {"checkpoints": [pattern.replace("RUN", str(run)) for pattern in patterns]}
    return values(run, home / "artifacts", **{"checkpoints": [str(run / NAMES[0])]} | change)

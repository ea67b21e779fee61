"""What every stage of a full fine-tune holds, per parameter, measured in a process of its own; printed as JSON.

A checkpoint of random weights is probed with a few short sequences, one at a time, so that next to nothing is held that
is not of the size of the model. The JSON: how many parameters there are; by stage, bytes of the host's and of the
device's memory at the peak above the loaded model; bytes of vectors in the store at most, by checkpoint, and after it.

python -m benchmarks.vectors_once --size 135M --folder FOLDER
"""

import argparse
import ctypes
import gc
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet  # noqa: F401  (what a stage would import)
import torch

from benchmarks.common import status_kilobytes
from entropy_core.config.read import parse_config
from entropy_core.pipeline.preflight import preflight
from entropy_core.pipeline.runner import Inputs, Runner, direct_runner
from entropy_core.pipeline.sweep import execution_for, sweep
from entropy_core.policy.derivatives import token_derivatives
from entropy_core.policy.model import Coefficients
from entropy_core.policy.pretrained import load_policy
from entropy_core.policy.spec import PolicySpec, policy_of
from entropy_core.store.artifact import Artifact
from entropy_core.store.data_files import VECTORS
from entropy_core.store.store import Stage, Store

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
}
SHAPES = {
    "12.9M": {
        "hidden_size": 320,
        "num_hidden_layers": 8,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "intermediate_size": 864,
        "vocab_size": 9_216,  # a fifth of the parameters are embeddings, as they are in SmolLM2
    },
    "135M": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49_152,
    },
}


def make_checkpoint(folder: Path, shape: dict[str, int]) -> None:
    """Write a checkpoint from the middle of a run, plain and in shards, and what the sweeps need beside it.

    These are the weights of the next checkpoint, a reference policy of the same shape, prompts, a reward, and a
    recorded batch. The embeddings are tied, and the run used dropout.
    """
    import torch.distributed.checkpoint as dcp
    from tokenizers import Tokenizer, models
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    tokens = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    settings = {"tie_word_embeddings": True, "max_position_embeddings": 64, "attention_dropout": 0.1}
    model = LlamaForCausalLM(LlamaConfig(**shape, **tokens, **settings))
    vocabulary = {f"w{i}": i for i in range(shape["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w2")), eos_token="w1", pad_token="w0"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    optimizer.step()
    plain, sharded = folder / "plain" / "checkpoint-1", folder / "sharded" / "checkpoint-1"
    for directory in (folder / "reference", plain.with_name("checkpoint-2"), plain):
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        with torch.no_grad():
            model.model.norm.weight *= 1.01
    torch.save(optimizer.state_dict(), plain / "optimizer.pt")
    model.config.save_pretrained(sharded)
    tokenizer.save_pretrained(sharded)
    moments = get_optimizer_state_dict(model, optimizer)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=sharded / "pytorch_model_fsdp_0", no_dist=True)
    dcp.save({"optimizer": moments}, checkpoint_id=sharded / "optimizer_0", no_dist=True)
    for step, directory in ((1, plain), (1, sharded), (2, plain.with_name("checkpoint-2"))):
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}), encoding="utf-8")
    (folder / "batches").mkdir()
    rows = [{"prompt": f"w{i // 2}", "completion_ids": [3 + i, 4, 1], "reward": i % 2} for i in range(4)]
    (folder / "batches" / "2.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prompts = [json.dumps({"prompt": f"w{i}"}) for i in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts), encoding="utf-8")
    (folder / "reward.py").write_text(
        "def length(completions, **_):\n    return [float(sum(map(ord, text)) % 5) for text in completions]\n"
    )


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "a sweep": ("plain", {}),
    "a sweep of shards, with the weights that they hold": (
        "sharded",
        {"policy": {"derivative": "central_difference"}},
    ),
    "a phase": ("plain", {"update": {"phase": {"follow": True, "minibatches": 2, "epochs": 1}}}),
    "a sweep with prices, interventions and a rehearsal": (
        "plain",
        {
            "price": True,
            "interventions": [{"entropy_coef": 0.01}, {"lr": 0.5}, {"beta1": 0.5}],
            "lab": {"measure": "all", "rehearse": {"steps": 2, "seeds": 1, "interventions": "none"}},
        },
    ),
    "a post-mortem": ("plain", {"post_mortem": True, "batch_config": {"U": {"from": "batches"}}}),
}
"""Sweeps that run every stage between them: the checkpoint, and what differs from the configuration of the first."""


def config_of(folder: Path, run: str) -> dict[str, Any]:
    """Return the configuration of one of the sweeps."""
    checkpoint, changes = RUNS[run]
    config: dict[str, Any] = {
        "name": "vectors",
        "checkpoints": [str(folder / checkpoint / "checkpoint-1")],
        "policy": {"derivative": "forward_mode"},
        "batch_config": {
            "E_total_sequences": 8,
            "B_U": 2,
            "G": 2,
            "dataset_name": str(folder / "prompts.jsonl"),
        },
        "generation": {"max_new_tokens": 4, "gen_batch_size": 1, "tf_batch_size": 1},
        "update": {
            "reward": f"{folder / 'reward.py'}:length",
            "max_grad_norm": 1e-3,
            "kl_beta": 0.1,
            "reference": str(folder / "reference"),
        },
        "importance": {"etas": [0, 1], "estimators": ["per_decision", "path_integral"]},
        "execution": {
            "artifacts": str(folder / "store"),
            "head_chunk_megabytes": 1,
            "keep_vectors": False,
        },
    }
    for section, settings in changes.items():
        config[section] = config.get(section, {}) | settings if isinstance(settings, dict) else settings
    if recorded := config["batch_config"].get("U"):
        config["batch_config"]["U"] = {"from": str(folder / recorded["from"])}
    return config


class Meter:
    """A runner that notes what each stage held."""

    def __init__(self, run: Any, root: Path) -> None:
        self.run, self.root = run, root
        self.host: dict[str, int] = {}
        self.device: dict[str, int] = {}
        self.store = 0
        self.before = (0, 0)

    def begin(self) -> None:
        """Count from what is there now."""
        self.before = _settle()

    def __call__(self, stage: Stage, inputs: Inputs, label: str) -> Artifact:
        """Run a stage; only the first use of its name counts, since the others are the same."""
        _settle()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        artifact = self.run(stage, inputs, label)
        on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        for found, now, before in (
            (self.host, status_kilobytes("VmHWM") * 1024, self.before[0]),
            (self.device, on_device, self.before[1]),
        ):
            found[stage.name] = max(found.get(stage.name, 0), now - before)
        self.store = max(self.store, self.in_store())
        return artifact

    def in_store(self) -> int:
        """Bytes of all numbers of the size of the model that are there: of their files, less their headers."""
        return sum(path.stat().st_size - _header(path) for path in self.root.glob(f"*/*/{VECTORS}*.safetensors"))


def _header(path: Path) -> int:
    """Bytes in front of the numbers of a safetensors file: the header's length, and the header."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _settle() -> tuple[int, int]:
    """Give freed memory back; bytes of host and device that are in use then."""
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    return status_kilobytes("VmRSS") * 1024, torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def main() -> None:
    """Make the checkpoint, or probe the one that is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--make", action="store_true", help="the checkpoint, and nothing else")
    options = parser.parse_args()
    if options.make:
        make_checkpoint(options.folder, SHAPES[options.size])
        return
    with tempfile.TemporaryDirectory() as folder:  # what the stages import is no memory of theirs
        make_checkpoint(Path(folder), TINY)
        measured(Path(folder))
    print(json.dumps(measured(options.folder)))


def measured(folder: Path) -> dict[str, Any]:
    """Run all sweeps on the checkpoint of a folder; returns what is printed."""
    host: dict[str, int] = {}
    device: dict[str, int] = {}
    store: dict[str, int] = {}
    after = count = 0
    for run in RUNS:
        config = parse_config(config_of(folder, run))
        checkpoints = preflight(config)
        execution = execution_for(config, checkpoints)
        meter = Meter(direct_runner(Store(config.store_root), execution), config.store_root)
        count = count or _load(checkpoints[0], execution)
        meter.begin()
        sweep(config, checkpoints, Store(config.store_root), Runner(meter))
        for into, found in ((host, meter.host), (device, meter.device)):
            into |= {name: max(found[name], into.get(name, 0)) for name in found}
        store[run], after = meter.store, max(after, meter.in_store())
        shutil.rmtree(config.store_root)
    load_policy.cache_clear()
    return {"parameters": count, "host": host, "device": device, "store": store, "after": after}


def _load(checkpoint: Any, execution: Any) -> int:
    """Load the policy as the stages do, and use each kind of pass once, on three tokens; how many parameters it has."""
    spec = PolicySpec(weights=checkpoint.weights, dtype="float32", attn_implementation="blockwise", temperature=1.0)
    policy = policy_of(spec, execution)
    parameters = policy.named_parameters()
    ids = torch.tensor([[3, 4, 5]])
    rows = policy_rows(ids.to(policy.device))
    weights = Coefficients(torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    policy.add_gradients(rows, [weights], 1.0, [policy.new_accumulator()])
    token_derivatives(policy, rows, {name: torch.ones_like(p) for name, p in parameters.items()}, 1.0)
    return sum(p.numel() for p in parameters.values())


def policy_rows(input_ids_BL: torch.Tensor) -> Any:
    """One sequence whose first token is the prompt."""
    from entropy_core.policy.scorer import TeacherForcedRows

    position_K = torch.arange(input_ids_BL.shape[1] - 1, device=input_ids_BL.device)
    return TeacherForcedRows(input_ids_BL, torch.zeros_like(position_K), position_K, input_ids_BL[0, 1:])


if __name__ == "__main__":
    main()

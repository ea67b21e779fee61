"""Memory that the reading of a checkpoint in shards takes, per parameter: of its optimizer, and of its weights.

Two ranks save a random model in SmolLM2's shape, sharded by torch's FSDP2, as verl and accelerate do.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.common import Row, peak_megabytes
from benchmarks.vectors_once import SHAPES
from entropy_core.execution import Execution
from entropy_core.files.checkpoint import checkpoint_digest, description_digest
from entropy_core.files.sources import Sources
from entropy_core.pipeline.catalogue import LOAD_CHECKPOINT, LOAD_WEIGHTS
from entropy_core.store.store import Stage, Store

SIZE, RANKS = "135M", 2
MARK = "≤ 8"  # bytes per parameter: the model in float32, and as much again
LAYOUTS = {"verl (FSDP2)": "verl/global_step_1", "FSDP with a sharded state dict (DCP)": "fsdp/checkpoint-1"}


def shards() -> Iterator[Row]:
    """Yield a row for every layout and each of the two stages that read shards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.multiprocessing.spawn(_save, (folder, SIZE), nprocs=RANKS)
        count = int((folder / "count").read_text())
        for layout, where in LAYOUTS.items():
            for stage in (LOAD_CHECKPOINT, LOAD_WEIGHTS):
                taken = peak_megabytes(reading, stage, folder / where, folder / "base") * 2**20 / count
                yield Row(
                    f"bytes per parameter, {stage.name}, {layout}, {RANKS} ranks, {SIZE}",
                    f"{taken:.2f} B host",
                    "4 B, the model",
                    taken,
                    MARK,
                ).because(lambda: "peak memory of the process in this stage, minus its memory before the stage")


def reading(stage: Stage, checkpoint: Path, base: Path) -> Callable[[], object]:
    """Return a run of a stage, from nothing each time.

    Args:
        stage: load-checkpoint or load-weights.
        checkpoint: its directory.
        base: directory of the model that describes the weights.
    """
    digest, description = checkpoint_digest(checkpoint), description_digest(base)
    execution = Execution(paths=Sources({digest: checkpoint, description: base}))
    inputs: dict[str, Any] = {"checkpoint": digest, "description": description}
    if stage.name == LOAD_CHECKPOINT.name:
        of_optimizer = {"learning_rate": 0.0, "optimizer_state": "checkpoint", "weights": "trained"}
        inputs = {"checkpoint": digest, "base": description, **of_optimizer}

    def run() -> None:
        with tempfile.TemporaryDirectory() as store:
            Store(Path(store)).run(stage, execution, inputs)

    return run


def _save(rank: int, folder: Path, size: str) -> None:
    """What one rank writes, after one step."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    warnings.simplefilter("ignore")  # of torch, about its own APIs
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    tokens = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    config = LlamaConfig(**SHAPES[size], **tokens, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    if rank == 0:
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / "base")
        (folder / "count").write_text(str(sum(p.numel() for p in model.parameters())))
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    actor = folder / LAYOUTS["verl (FSDP2)"] / "actor"
    actor.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), actor / f"model_world_size_{RANKS}_rank_{rank}.pt")
    torch.save(optimizer.state_dict(), actor / f"optim_world_size_{RANKS}_rank_{rank}.pt")
    directory = folder / "fsdp" / "checkpoint-1"
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=directory / "pytorch_model_fsdp_0")
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=directory / "optimizer_0")
    dist.barrier()
    dist.destroy_process_group()

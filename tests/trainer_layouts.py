"""Checkpoints as the trainers that shard write them, by torch's own FSDP2, FSDP1 and DCP on gloo ranks.

`written` trains a tiny Llama for two steps and saves it in every layout. Beside each other lie, in one folder:

    plain/checkpoint-2      the same state as the Trainer saves it: the truth of the FSDP2 layouts
    fsdp_full, accelerate, fsdp_sharded, verl/global_step_2, skyrl/global_step_2, prime_rl/step_2, nemo_rl/step_2,
    titan/step-2, fsdp1/global_step_2, sharded_tensors/global_step_2
    truth_fsdp1.pt, weights_fsdp1.pt    name → slot and name → weight of the first FSDP1 layout, as FSDP gathers them;
    truth_sharded_tensors.pt, …         the same of the second, which has no device mesh
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from pipeline_fixtures import trainer_groups

from entropy_core.demo.run import DemoSettings, build_model, build_tokenizer

STEPS = 2
SHAPE = DemoSettings(
    hidden_size=16, layers=2, heads=2, intermediate_size=23
)  # 23 rows do not go into two shards, nor 16 into 3
HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-7}


def written(folder: Path, ranks: int = 2) -> Path:
    """Write all of them on so many ranks; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(_rank, (folder, ranks), nprocs=ranks)
    describe(folder / "fsdp_full", folder / "plain" / "checkpoint-2")
    return folder


def describe(directory: Path, original: Path, inside: str = "") -> Path:
    """Put a model's configuration and tokenizer into a checkpoint, and no weights."""
    target = directory / inside
    target.mkdir(parents=True, exist_ok=True)
    for file in original.iterdir():
        if file.suffix == ".json" and not file.name.startswith(("trainer_state", "model.")):
            shutil.copy(file, target / file.name)
    return directory


def _rank(rank: int, folder: Path, ranks: int) -> None:
    warnings.simplefilter("ignore")  # of torch, about its own APIs
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    _fsdp2(rank, folder)
    _fsdp1(rank, folder, "fsdp1", device_mesh=True)
    _fsdp1(rank, folder, "sharded_tensors", device_mesh=False)
    dist.barrier()
    dist.destroy_process_group()


def _train(model: Any, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.randint(2, 16, (4, 9), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _fsdp2(rank: int, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = build_model(SHAPE)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(trainer_groups(model), **HYPERPARAMETERS)
    _train(model, optimizer)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)
    moments = get_optimizer_state_dict(model, optimizer, options=whole)
    if rank == 0:
        _gathered(folder, weights, moments)
    sharded = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)
    _save({"model": sharded[0]}, folder / "fsdp_sharded" / "pytorch_model_fsdp_0")
    _save({"optimizer": sharded[1]}, folder / "fsdp_sharded" / "optimizer_0")
    _save({"model": sharded[0]}, folder / "nemo_rl" / "step_2" / "policy" / "weights")
    _save({"optim": {"optim": sharded[1]}}, folder / "nemo_rl" / "step_2" / "policy" / "optimizer")
    app = {"model": sharded[0], "optimizers": sharded[1], "progress": {"step": STEPS}}
    _save({"app": app}, folder / "prime_rl" / "step_2" / "trainer")
    one_by_one = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    _save({"model": sharded[0], "optimizer": one_by_one}, folder / "titan" / "step-2")
    for trainer, actor in (("verl", "actor"), ("skyrl", "policy")):
        _of_rank(folder / trainer / "global_step_2" / actor, rank, model.state_dict(), optimizer.state_dict())


def _gathered(folder: Path, weights: dict[str, Any], moments: dict[str, Any]) -> None:
    """What one rank writes alone: the plain checkpoint, FSDP's full state dict, accelerate's save_state."""
    plain = folder / "plain" / "checkpoint-2"
    model = build_model(SHAPE)
    model.load_state_dict(weights)
    model.save_pretrained(plain)
    build_tokenizer().save_pretrained(plain)
    (plain / "trainer_state.json").write_text(json.dumps({"global_step": STEPS}))
    groups = [group | {"params": list(group["params"])} for group in moments["param_groups"]]
    names = [name for group in groups for name in group["params"]]
    numbered = {
        "state": {names.index(name): slot for name, slot in moments["state"].items()},
        "param_groups": [group | {"params": [names.index(name) for name in group["params"]]} for group in groups],
    }
    torch.save(numbered, plain / "optimizer.pt")
    full = folder / "fsdp_full"
    full.mkdir()
    torch.save(moments, full / "optimizer.bin")
    torch.save(weights, full / "pytorch_model_fsdp.bin")
    accelerate = folder / "accelerate"
    shutil.copytree(plain, accelerate)
    (accelerate / "optimizer.pt").rename(accelerate / "optimizer.bin")
    for file in accelerate.glob("*.json"):  # accelerate knows neither the model's configuration nor the step
        file.unlink()


def _fsdp1(rank: int, folder: Path, name: str, device_mesh: bool) -> None:
    import functools

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import ShardedStateDictConfig, StateDictType
    from torch.distributed.fsdp.api import ShardedOptimStateDictConfig
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plain = build_model(SHAPE)
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={type(plain.model.layers[0])})
    mesh = {"device_mesh": init_device_mesh("cpu", (dist.get_world_size(),))} if device_mesh else {}
    model = FSDP(plain, auto_wrap_policy=policy, use_orig_params=False, device_id=torch.device("cpu"), **mesh)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, **HYPERPARAMETERS)
    _train(model, optimizer)
    moments = FSDP.full_optim_state_dict(model, optimizer)
    config = ShardedStateDictConfig(True), ShardedOptimStateDictConfig(True)
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, *config):
        sharded = model.state_dict()
        _of_rank(folder / name / "global_step_2" / "actor", rank, sharded, optimizer.state_dict())
    weights = {key: _whole(tensor, rank) for key, tensor in sharded.items()}
    if rank == 0:
        torch.save(moments["state"], folder / f"truth_{name}.pt")
        torch.save(weights, folder / f"weights_{name}.pt")


def _whole(tensor: Any, rank: int) -> torch.Tensor:
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    gathered = torch.empty(tensor.size()) if rank == 0 else None
    tensor.gather(0, gathered)
    return gathered


def _of_rank(directory: Path, rank: int, weights: Any, optimizer: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    of_rank = f"world_size_{dist.get_world_size()}_rank_{rank}.pt"
    torch.save(weights, directory / f"model_{of_rank}")
    torch.save(optimizer, directory / f"optim_{of_rank}")
    torch.save({"rng": rank}, directory / f"extra_state_{of_rank}")


def _save(state: dict[str, Any], directory: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=directory)

"""Checkpoints as the trainers that shard write them, by torch's own FSDP2, FSDP1 and DCP on gloo ranks.

`written` trains a tiny Llama for two steps and saves it in every layout. Beside each other lie, in one folder:

    plain/checkpoint-2      the same state as the Trainer saves it: the truth of the FSDP2 layouts
    fsdp_full, accelerate, fsdp_sharded, verl/global_step_2, skyrl/global_step_2, prime_rl/step_2, nemo_rl/step_2,
    titan/step-2, fsdp1/global_step_2, sharded_tensors/global_step_2
    truth_fsdp1.pt, weights_fsdp1.pt    name → slot and name → weight of the first FSDP1 layout, as FSDP gathers them;
    truth_sharded_tensors.pt, …         the same of the second, which has no device mesh

`written_lora` does the same with an adapter on a base with tied embeddings:

    base, plain/checkpoint-2                            the truth of the first three
    fsdp_full/checkpoint-2, fsdp_sharded/checkpoint-2   as the Trainer saves it: the adapter in PEFT's files
    verl/global_step_2, fsdp1/global_step_2             as verl does: the adapter in `actor/lora_adapter`
    truth_fsdp1.pt                                      of the last one, as FSDP gathers it
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from fork_server import fork_server
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from pipeline_fixtures import trainer_groups
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from entropy_core.checkpoints.layouts.places import open_state
from entropy_core.demo.run import DemoSettings, build_model, build_tokenizer

OTHERS = Path(__file__).parent / "of_other_writers"
STEPS = 2
SHAPE = DemoSettings(
    hidden_size=16, layers=2, heads=2, intermediate_size=23
)  # 23 rows do not go into two shards, nor 16 into 3
HYPERPARAMETERS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-7}


def written(folder: Path, ranks: int = 2, tied: bool = False) -> Path:
    """Write all of them on so many ranks; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _on_ranks(_rank, folder, ranks, tied)
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


def deepspeed(kind: str, folder: Path) -> Path:
    """A checkpoint of DeepSpeed with the configuration of its model: `zero2`, or `universal2` that was made of it."""
    directory = folder / "checkpoint-2"
    if kind.startswith("universal"):
        shutil.unpack_archive(OTHERS / f"{kind}.zip", directory)
    else:
        shutil.copytree(OTHERS / kind, directory, ignore=shutil.ignore_patterns("truth.pt"))
    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 22, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    LlamaConfig(**sizes, **heads, **tokens, tie_word_embeddings=False).save_pretrained(directory)
    return directory


def truth_of_deepspeed(kind: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """First moment (empty for stage 2) and float32 weight by name, of the training that a checkpoint is of."""
    of = kind.replace("universal", "zero")
    return torch.load(OTHERS / of / "truth.pt", weights_only=True)


def whole(moment: Any) -> torch.Tensor:
    """A moment in one tensor, wherever it lies."""
    return moment if isinstance(moment, torch.Tensor) else moment.whole()


def weights_in(place: Path) -> dict[str, torch.Tensor]:
    """The weights of a place, each in one tensor."""
    return {name: tensor.whole() for name, tensor in open_state(place).weights().items()}


def written_lora(folder: Path, ranks: int = 2) -> Path:
    """Write those with an adapter on so many ranks; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    base = _model(tied=True)
    base.save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    _on_ranks(_rank_of_lora, folder, ranks)
    return folder


def _on_ranks(function: Callable[..., None], folder: Path, ranks: int, *more: Any) -> None:
    """Call a function in a process for each rank."""
    fork_server()
    torch.multiprocessing.start_processes(function, (folder, ranks, *more), nprocs=ranks, start_method="forkserver")


@contextmanager
def _group(rank: int, folder: Path, ranks: int) -> Iterator[None]:
    warnings.simplefilter("ignore")  # of torch, about its own APIs
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    yield
    dist.barrier()
    dist.destroy_process_group()


def _rank(rank: int, folder: Path, ranks: int, tied: bool) -> None:
    with _group(rank, folder, ranks):
        _fsdp2(rank, folder, tied)
        _fsdp1(rank, folder, "fsdp1", _model(tied), device_mesh=True)
        _fsdp1(rank, folder, "sharded_tensors", _model(tied), device_mesh=False)


def _rank_of_lora(rank: int, folder: Path, ranks: int) -> None:
    with _group(rank, folder, ranks):
        _fsdp2_lora(rank, folder)
        model = _with_lora(folder)
        _fsdp1(rank, folder, "fsdp1", model, device_mesh=True)
        if rank == 0:
            truth = torch.load(folder / "weights_fsdp1.pt", weights_only=True)
            _lora_adapter(folder / "fsdp1" / "global_step_2" / "actor", _with_lora(folder), truth)  # not wrapped


def _model(tied: bool) -> Any:
    model = build_model(SHAPE)
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    return model


def _with_lora(folder: Path) -> Any:
    """On the base; B is no longer 0, so that A has a gradient, too."""
    torch.manual_seed(3)
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _lora_adapter(actor: Path, model: Any, weights: dict[str, Any]) -> None:
    """What verl saves beside its shards, with the settings of PEFT as its dataclass has them."""
    (actor / "lora_adapter").mkdir()
    save_file(get_peft_model_state_dict(model, weights), actor / "lora_adapter" / "adapter_model.safetensors")
    said = asdict(model.peft_config["default"])
    said |= {"task_type": said["task_type"].value, "peft_type": said["peft_type"].value}
    said["target_modules"] = list(said["target_modules"])
    (actor / "lora_adapter" / "adapter_config.json").write_text(json.dumps(said, indent=4))


def _fsdp2_lora(rank: int, folder: Path) -> None:
    """verl's optimizer lists every parameter, and moves those of the adapter; the Trainer's lists these alone."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = _with_lora(folder)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, **HYPERPARAMETERS)
    _train(model, optimizer)
    of_trainer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    of_trainer.param_groups[0] |= {"lr": HYPERPARAMETERS["lr"], "betas": (0.9, 0.99), "eps": 1e-7}
    of_trainer.state = optimizer.state
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(model, options=whole)
    moments = get_optimizer_state_dict(model, of_trainer, options=whole)
    sharded = get_optimizer_state_dict(model, of_trainer, options=StateDictOptions(ignore_frozen_params=True))
    _save({"optimizer": sharded}, folder / "fsdp_sharded" / "checkpoint-2" / "optimizer_0")
    actor = folder / "verl" / "global_step_2" / "actor"
    _of_rank(actor, rank, model.state_dict(), optimizer.state_dict())
    if rank == 0:
        _lora_adapter(actor, model, weights)
        for place in ("plain", "fsdp_full", "fsdp_sharded"):
            directory = folder / place / "checkpoint-2"
            shutil.copytree(actor / "lora_adapter", directory, dirs_exist_ok=True)
            (directory / "trainer_state.json").write_text(json.dumps({"global_step": STEPS}))
        torch.save(moments, folder / "fsdp_full" / "checkpoint-2" / "optimizer.bin")
        names = moments["param_groups"][0]["params"]
        groups = [moments["param_groups"][0] | {"params": list(range(len(names)))}]
        numbered = {"state": {i: moments["state"][name] for i, name in enumerate(names)}, "param_groups": groups}
        torch.save(numbered, folder / "plain" / "checkpoint-2" / "optimizer.pt")


def _train(model: Any, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.randint(2, 16, (4, 9), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _fsdp2(rank: int, folder: Path, tied: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = _model(tied)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(trainer_groups(model), **HYPERPARAMETERS)
    _train(model, optimizer)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)
    moments = get_optimizer_state_dict(model, optimizer, options=whole)
    if rank == 0:
        _gathered(folder, weights, moments, tied)
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


def _gathered(folder: Path, weights: dict[str, Any], moments: dict[str, Any], tied: bool) -> None:
    """What one rank writes alone: the plain checkpoint, FSDP's full state dict, accelerate's save_state."""
    plain = folder / "plain" / "checkpoint-2"
    model = _model(tied)
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


def _fsdp1(rank: int, folder: Path, name: str, plain: Any, device_mesh: bool) -> None:
    """Every layer is a unit, and so is every trained matrix in it if not all is trained."""
    import functools

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import ShardedStateDictConfig, StateDictType
    from torch.distributed.fsdp.api import ShardedOptimStateDictConfig
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    def is_factor(module: torch.nn.Module) -> bool:
        leaf = not list(module.children()) and getattr(module, "weight", None) is not None
        return leaf and module.weight.requires_grad

    policies = [functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})]
    if not all(parameter.requires_grad for parameter in plain.parameters()):
        policies = [functools.partial(lambda_auto_wrap_policy, lambda_fn=is_factor), *policies]
    policy = functools.partial(_or_policy, policies=policies)
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

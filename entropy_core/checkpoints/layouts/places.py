"""Where the state of a trainer lies in a checkpoint's directory, and which layout reads it.

optimizer.pt                                    transformers.Trainer, TRL
optimizer.bin                                   FSDP with a full state dict, accelerate's save_state
optimizer_0/, pytorch_model_fsdp_0/             FSDP with a sharded state dict (DCP)
global_stepN/*_optim_states.pt                  DeepSpeed, ZeRO 1 to 3; `latest` says which
global_stepN_universal/zero/                    the same as a universal checkpoint; `latest_universal` says which
optim_world_size_W_rank_R.pt                    verl (in actor/), SkyRL (in policy/)
trainer/.metadata                               prime-rl (DCP)
policy/optimizer/.metadata, policy/weights/     NeMo-RL (DCP)
.metadata                                       torchtitan (DCP)
"""

import re
from pathlib import Path
from typing import NamedTuple

from entropy_core.checkpoints.layouts.deepspeed import OPTIMIZER_STATES, DeepSpeed
from entropy_core.checkpoints.layouts.distributed import METADATA, DistributedCheckpoint
from entropy_core.checkpoints.layouts.interface import SavedState
from entropy_core.checkpoints.layouts.per_rank import RANKS, PerRank
from entropy_core.checkpoints.layouts.single_file import OptimizerFile, SafetensorsFile, WeightsFile
from entropy_core.checkpoints.layouts.universal import GROUPS, Universal
from entropy_core.errors import CheckpointError, some_names
from entropy_core.files.checkpoint import names_in

_ENGINE = re.compile(r"global_step\d+")
_UNIVERSAL = re.compile(r"\w*_universal")
_GATHERED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model_fsdp.bin")
_ITERATION = re.compile(r"iter_\d{7}")


class Places(NamedTuple):
    """Where the state lies.

    Attributes:
        trainer: who saves so, for people.
        optimizer: the file or folder; None where there is none.
        weights: the same of the weights, where they are not in a model.safetensors.
        described: folders that may hold the model's config.json and tokenizer.
    """

    trainer: str
    optimizer: Path | None
    weights: Path | None
    described: tuple[Path, ...] = ()


def find_places(directory: Path) -> Places | None:
    """Recognise the layout of a checkpoint.

    Args:
        directory: of the checkpoint.

    Returns:
        Where its state lies; None where there is only a model, or nothing.

    Raises:
        CheckpointError: it is a layout that is known and not read; or two places could be meant.
    """
    has = names_in(directory)
    if "optimizer.pt" in has:
        return Places("the Trainer", directory / "optimizer.pt", None)
    _refuse(directory, has)
    if "optimizer.bin" in has:
        weights = next((directory / name for name in _GATHERED if name in has), None)
        return Places("FSDP with a full state dict, or accelerate", directory / "optimizer.bin", weights)
    sharded = _only(directory, has, r"optimizer_\d+"), _only(directory, has, r"pytorch_model_fsdp_\d+")
    if any(sharded):
        return Places("FSDP with a sharded state dict", *sharded)
    if engine := _engine(directory, has) or _universal(directory, has):
        return Places("DeepSpeed", engine, engine)
    for folder in (directory, directory / "actor", directory / "policy"):
        if folder.is_dir() and any(RANKS.fullmatch(name) for name in names_in(folder)):
            return Places("verl or SkyRL", folder, folder, (folder / "huggingface", folder))
    for folder in (directory / "policy", directory):
        parts = [folder / name for name in ("optimizer", "weights")]
        if all((part / METADATA).exists() for part in parts):
            return Places("NeMo-RL", parts[0], parts[1], (folder / "tokenizer", folder))
    for folder in (directory / "trainer", directory):
        if (folder / METADATA).exists():
            return Places("prime-rl or torchtitan", folder, folder, (folder, directory))
    return None


def open_state(path: Path) -> SavedState:
    """Open one place that `find_places` found.

    Args:
        path: of the file or folder.

    Returns:
        What reads it.

    Raises:
        CheckpointError: its files are incomplete, damaged, or do not fit together.
    """
    if not path.is_dir():
        if path.name in _GATHERED:
            return WeightsFile(path) if path.suffix == ".bin" else SafetensorsFile(path)
        return OptimizerFile(path)
    names = names_in(path)
    if METADATA in names:
        return DistributedCheckpoint(path)
    if any(OPTIMIZER_STATES.fullmatch(name) for name in names):
        return DeepSpeed(path)
    if (path / GROUPS).exists():
        return Universal(path)
    return PerRank(path)


def _only(directory: Path, has: set[str], pattern: str) -> Path | None:
    """The one folder of this kind with a distributed checkpoint in it."""
    found = sorted(name for name in has if re.fullmatch(pattern, name) and (directory / name / METADATA).exists())
    if len(found) > 1:
        raise CheckpointError(
            f"{directory} holds {some_names(found)}, and the state of one model is read",
            cause="accelerate prepared several models or optimizers",
            fix="give a copy of the checkpoint with the folder of the policy alone",
        )
    return directory / found[0] if found else None


def _engine(directory: Path, has: set[str]) -> Path | None:
    """The folder that DeepSpeed wrote last."""
    if any(OPTIMIZER_STATES.fullmatch(name) for name in has):
        return directory
    found = sorted(name for name in has if _ENGINE.fullmatch(name) and (directory / name).is_dir())
    found = [name for name in found if any(map(OPTIMIZER_STATES.fullmatch, names_in(directory / name)))]
    return _latest(directory, found, "latest")


def _universal(directory: Path, has: set[str]) -> Path | None:
    """The folder that was converted last."""
    if (directory / GROUPS).exists():
        return directory
    found = sorted(name for name in has if _UNIVERSAL.fullmatch(name) and (directory / name / GROUPS).exists())
    if not found and "latest_universal" in has:
        raise CheckpointError(
            f"{directory} has a latest_universal, and no folder with {GROUPS} beside it",
            cause="the conversion or the copy was interrupted",
            fix="convert it again with DeepSpeed's ds_to_universal.py, or probe the original",
        )
    return _latest(directory, found, "latest_universal")


def _latest(directory: Path, found: list[str], says: str) -> Path | None:
    """The one of several folders that a file names; the only one where there is no such file."""
    if (directory / says).is_file() and found:
        latest = (directory / says).read_bytes()[:256].decode("utf-8", "replace").strip()
        if latest not in found:
            raise CheckpointError(
                f"{directory / says} names {latest!r}, and there is {some_names(found)}",
                cause="the save was interrupted, or the file was edited",
                fix="correct the file, or probe another checkpoint",
            )
        found = [latest]
    if len(found) > 1:
        fact = f"{directory} holds {some_names(found)}, and no `{says}` says which of them counts"
        raise CheckpointError(fact, fix=f"give one of them, or write its name into `{says}`")
    return directory / found[0] if found else None


_CONVERT = "and probe the result with `optimizer_state: fresh`: the optimizer's state cannot be read"


def _refuse(directory: Path, has: set[str]) -> None:
    """Name a layout that is known and not read, and what converts it."""
    inside = [names_in(directory / name) for name in ("actor", "policy") if (directory / name).is_dir()]
    everything = has.union(*inside)
    if "dist_ckpt" in everything:
        raise _known(directory, "verl with Megatron", "`python -m verl.model_merger merge --backend megatron`")
    torch_dist = {"common.pt", "metadata.json"} <= has or "latest_checkpointed_iteration.txt" in has
    if torch_dist or any(_ITERATION.fullmatch(name) for name in has) or "mp_rank_00" in has:
        tool = "slime's tools/convert_torch_dist_to_hf.py, or Megatron Bridge's `export_ckpt`,"
        raise _known(directory, "Megatron (as slime and NeMo save it)", tool)
    if "recipe_state.pt" in everything or "recipe_state" in has:
        raise _known(directory, "torchtune", "its FullModelHFCheckpointer writes model.safetensors,")


def _known(directory: Path, trainer: str, tool: str) -> CheckpointError:
    return CheckpointError(
        f"{directory} is a checkpoint of {trainer}, which is not read",
        cause="its files are cut by more than the parameters",
        fix=f"convert it: {tool} {_CONVERT}",
    )

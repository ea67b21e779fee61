"""Which files make a checkpoint, and where they lie.

    of `transformers.Trainer` and TRL       config.json, model.safetensors (or shards), optimizer.pt, trainer_state.json
    the same with a LoRA adapter            adapter_config.json, adapter_model.safetensors in place of the model
    with the model in a folder of its own   model/ (either of the above), optimizer.pt, training_info.json, and
                                            optimizer_param_names.json where there is one
    a model alone                           config.json, model.safetensors; its optimizer is said to be fresh

`trainer_state.json` and `training_info.json` count in all of them.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from entropy_core.checkpoints.adapters import ADAPTER_WEIGHTS, adapter_base
from entropy_core.checkpoints.content import read_json
from entropy_core.errors import CheckpointError, some_names
from entropy_core.files.checkpoint import SAVE_AGAIN, model_directory, names_in, require_directory
from entropy_core.files.hub_cache import cached_snapshot

PROGRESS_FILES = ("trainer_state.json", "training_info.json")
_FRESH = "if its optimizer has not made a step yet, say `optimizer_state: fresh`"


@dataclass(frozen=True)
class Layout:
    """Where the parts of a checkpoint lie.

    Attributes:
        directory: the checkpoint.
        model: directory of the model, or of the adapter.
        base: directory of the model under the adapter; None for a full model.
        optimizer: the optimizer's state; None where it is fresh.
        names: the optimizer's parameter names; None where there is no such file.
        progress: what says the trainer's step; None where it is fresh and nothing says it.
    """

    directory: Path
    model: Path
    base: Path | None
    optimizer: Path | None
    names: Path | None
    progress: Path | None

    @property
    def architecture(self) -> Path:
        """The directory whose config.json describes the model."""
        return self.base or self.model


def find_layout(directory: Path, base_model: Path | str = "", fresh: bool = False) -> Layout:
    """Find the parts of a checkpoint; refuse a directory that lacks one, and say what it is instead.

    Args:
        directory: a checkpoint directory.
        base_model: takes the place of the base that an adapter names.
        fresh: the optimizer has made no step, whatever files there are.

    Returns:
        Where they lie.

    Raises:
        CheckpointError: there is no such directory, a file is missing, or the base model is not on this machine.
    """
    directory = Path(directory)
    require_directory(directory)
    has = names_in(directory)
    model = model_directory(directory)
    inside = names_in(model)
    base = None
    if "adapter_config.json" in inside:
        _require_adapter_files(model, inside)
        base = _base_directory(model, base_model)
    else:
        _require_model_files(model, inside)
    optimizer = None if fresh else _optimizer(directory, has)
    progress = next((directory / name for name in PROGRESS_FILES if name in has), None)
    if progress is None and not fresh:
        fact = f"{directory} has no {' or '.join(PROGRESS_FILES)}"
        raise CheckpointError(fact, cause="the save was interrupted", fix=SAVE_AGAIN)
    names = directory / "optimizer_param_names.json"
    return Layout(directory, model, base, optimizer, names if optimizer and names.exists() else None, progress)


def _require_adapter_files(directory: Path, has: set[str]) -> None:
    if full := has & {"model.safetensors", "model.safetensors.index.json"}:
        raise CheckpointError(
            f"{directory} holds both an adapter (adapter_config.json) and a model ({', '.join(sorted(full))})",
            cause="the model was merged or saved beside its adapter",
            fix="give each a directory of its own, with the optimizer.pt that belongs to it",
        )
    if ADAPTER_WEIGHTS not in has:
        raise CheckpointError(
            f"{directory} has an adapter_config.json and no {ADAPTER_WEIGHTS}",
            cause="adapter_model.bin, which is a pickle" if "adapter_model.bin" in has else "an interrupted save",
            fix="save the adapter as safetensors",
        )


def _base_directory(adapter: Path, base_model: Path | str) -> Path:
    """The base model's directory: the one that was given, else the one that the adapter names; never the network.

    A name that is no directory is looked up in the hub cache.
    """
    named = adapter_base(adapter)
    base = Path(base_model or named).expanduser()
    if named and not base_model and not base.is_dir():
        revision = read_json(adapter / "adapter_config.json").get("revision") or "main"
        base = cached_snapshot(named, "models", str(revision)) or base
    if not (base_model or named) or not base.is_dir():
        told = f"policy.base_model says {str(base_model)!r}" if base_model else f"it names {named!r}"
        raise CheckpointError(
            f"the base model of the adapter in {adapter} is not on this machine: {told}, which is no directory here, "
            "nor in the hub cache",
            cause="it was trained elsewhere, and nothing is downloaded",
            fix="set `policy.base_model` to the directory of that model",
        )
    inside = names_in(base)
    if "adapter_config.json" in inside:
        fact = f"the base model {base} of the adapter in {adapter} is an adapter itself"
        raise CheckpointError(fact, fix="merge the lower adapter into its base, and set `policy.base_model` to it")
    _require_model_files(base, inside)
    return base


def _require_model_files(directory: Path, has: set[str]) -> None:
    if "config.json" not in has:
        inside = sorted(name for name in has if name.startswith("checkpoint-"))
        cause = f"it is a run directory, with {some_names(inside)} in it" if inside else ""
        if orphan := has & {ADAPTER_WEIGHTS, "adapter_model.bin"}:
            cause = f"{', '.join(orphan)} is an adapter, whose adapter_config.json is missing"
        raise CheckpointError(
            f"{directory} has no config.json",
            cause=cause,
            fix=f"give {directory}/checkpoint-*" if inside else "give a directory that a trainer saved",
        )
    if not has & {"model.safetensors", "model.safetensors.index.json"}:
        pickled = sorted(name for name in has if name.startswith("pytorch_model") and ".bin" in name)
        cause, convert = _sharded(has)
        raise CheckpointError(
            f"{directory} has no weights: neither model.safetensors nor model.safetensors.index.json",
            cause=cause,
            fix=f"convert {pickled[0]} to safetensors" if pickled else convert or SAVE_AGAIN,
        )


def _optimizer(directory: Path, has: set[str]) -> Path:
    if "optimizer.pt" not in has:
        cause, convert = _sharded(has)
        raise CheckpointError(
            f"{directory} has no optimizer.pt",
            cause=cause or "save_only_model=True",
            fix=convert or f"save checkpoints with save_only_model=False; {_FRESH}",
        )
    return directory / "optimizer.pt"


def _sharded(has: set[str]) -> tuple[str, str]:
    """The cause and the fix where a sharded trainer has saved; both empty where not."""
    shards = re.compile(r"global_step\d+$|pytorch_model_fsdp|optimizer_\d+$|optimizer\.bin$")
    sharded = sorted(filter(shards.match, has))
    if not sharded:
        return "", ""
    convert = "convert it to model.safetensors and optimizer.pt, or train without sharding"
    return f"saved by DeepSpeed or FSDP as {some_names(sharded)}", convert

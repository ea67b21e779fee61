"""Which files make a checkpoint, and where they lie.

    of `transformers.Trainer` and TRL       config.json, model.safetensors (or shards), optimizer.pt, trainer_state.json
    the same with a LoRA adapter            adapter_config.json, adapter_model.safetensors in place of the model
    with the model in a folder of its own   model/ (either of the above), optimizer.pt, training_info.json, and
                                            optimizer_param_names.json where there is one
    a model alone                           config.json, model.safetensors; its optimizer is said to be fresh
    verl with a LoRA adapter                lora_adapter/ beside the shards, or lora_train_meta.json among them
    of a trainer that shards                what `layouts.places` says in place of optimizer.pt; where it keeps the
                                            weights in shards too, config.json lies beside them or is said

`trainer_state.json` and `training_info.json` count in all of them.
"""

from dataclasses import dataclass
from pathlib import Path

from entropy_core.checkpoints.adapter_files import ADAPTER_WEIGHTS, LORA_META, adapter_base
from entropy_core.checkpoints.content import read_json
from entropy_core.checkpoints.layouts.places import Places, find_places
from entropy_core.errors import CheckpointError, some_names
from entropy_core.files.checkpoint import SAVE_AGAIN, model_directory, names_in, require_directory
from entropy_core.files.hub_cache import cached_snapshot

PROGRESS_FILES = ("trainer_state.json", "training_info.json")
_FRESH = "if its optimizer has not made a step yet, say `optimizer_state: fresh`"
_MODEL_FILES = {"model.safetensors", "model.safetensors.index.json"}


@dataclass(frozen=True)
class Layout:
    """Where the parts of a checkpoint lie.

    Attributes:
        directory: the checkpoint.
        model: directory of the model, or of the adapter; where the weights are in shards, the one with its config.json.
        base: directory of the model under the adapter; None for a full model.
        optimizer: file or folder of the optimizer's state; None where it is fresh.
        names: the optimizer's parameter names; None where there is no such file.
        progress: what says the trainer's step; None where no file does.
        shards: file or folder of the weights that transformers cannot open; None where it can.
    """

    directory: Path
    model: Path
    base: Path | None
    optimizer: Path | None
    names: Path | None
    progress: Path | None
    shards: Path | None = None

    @property
    def architecture(self) -> Path:
        """The directory whose config.json describes the model."""
        return self.base or self.model


def find_layout(directory: Path, base_model: Path | str = "", fresh: bool = False, masters: bool = False) -> Layout:
    """Find the parts of a checkpoint; refuse a directory that lacks one, and say what it is instead.

    Args:
        directory: a checkpoint directory.
        base_model: takes the place of the base that an adapter names; describes the model of shards without a
            config.json beside them.
        fresh: the optimizer has made no step, whatever files there are.
        masters: the weights are those of the shards, even where there are others that transformers can open.

    Returns:
        Where they lie.

    Raises:
        CheckpointError: there is no such directory, a file is missing, the base model is not on this machine, or there
            are no masters.
    """
    directory = Path(directory)
    require_directory(directory)
    has = names_in(directory)
    model = model_directory(directory)
    inside = names_in(model)
    opens = "adapter_config.json" in inside or ("config.json" in inside and bool(inside & _MODEL_FILES))
    places = None if fresh and opens and not masters else find_places(directory)
    base = shards = None
    in_shards = bool(not opens and places and places.weights and (places.weights / LORA_META).is_file())
    adapted = in_shards or "adapter_config.json" in inside
    if masters and (adapted or (opens and not has_second_copy(places))):
        what = "an adapter, whose weights are one copy" if adapted else "no weights in shards"
        raise CheckpointError(
            f"policy.weights is master, and {directory} has {what}",
            cause="a trainer that keeps one copy of its weights",
            fix="leave policy.weights out",
        )
    if "adapter_config.json" in inside:
        _require_adapter_files(model, inside)
        base = _base_directory(model, base_model)
    elif in_shards and places is not None and places.weights is not None:
        model = places.weights
        base = _base_directory(model, base_model)
    elif (masters or not opens) and places is not None and places.weights is not None:
        shards = places.weights
        model = _description(directory, model, places, base_model)
    else:
        _require_model_files(model, inside)
    optimizer = None
    if not fresh:
        optimizer = places.optimizer if places else None
        if optimizer is None:
            raise CheckpointError(
                f"{directory} has no optimizer.pt, and no optimizer state in the format of another trainer",
                cause="save_only_model=True",
                fix=f"save checkpoints with save_only_model=False; {_FRESH}",
            )
    progress = next((directory / name for name in PROGRESS_FILES if name in has), None)
    if progress is None and optimizer == directory / "optimizer.pt":
        fact = f"{directory} has no {' or '.join(PROGRESS_FILES)}"
        raise CheckpointError(fact, cause="the save was interrupted", fix=SAVE_AGAIN)
    names = directory / "optimizer_param_names.json"
    return Layout(directory, model, base, optimizer, names if optimizer and names.exists() else None, progress, shards)


def has_second_copy(places: Places | None) -> bool:
    """Whether a trainer keeps weights in shards, beside or in place of those that transformers opens."""
    return bool(places and places.weights and not places.weights.name.startswith("model.safetensors"))


def _description(directory: Path, model: Path, places: Places, base_model: Path | str) -> Path:
    """The directory whose config.json and tokenizer belong to weights in shards."""
    candidates = [Path(base_model).expanduser()] if base_model else [model, *places.described]
    found = [path for path in candidates if (path / "config.json").is_file()]
    if not found:
        told = f"policy.base_model says {str(base_model)!r}" if base_model else "and none beside its shards"
        raise CheckpointError(
            f"{directory} is a checkpoint of {places.trainer} without a config.json: {told}",
            cause="this trainer saves shards alone",
            fix="set `policy.base_model` to the model that the training started from: its config.json and tokenizer "
            "are read, and its weights are not",
        )
    names_in(found[0])
    return found[0]


def _require_adapter_files(directory: Path, has: set[str]) -> None:
    if full := has & _MODEL_FILES:
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


def named_base(adapter: Path) -> Path | None:
    """The directory of the base that an adapter names, or its snapshot in the hub cache; None if neither is here."""
    named = adapter_base(adapter)
    if not named or Path(named).expanduser().is_dir():
        return Path(named).expanduser() if named else None
    revision = read_json(adapter / "adapter_config.json").get("revision") or "main"
    return cached_snapshot(named, "models", str(revision))


def _base_directory(adapter: Path, base_model: Path | str) -> Path:
    """The base model's directory: the one that was given, else the one that the adapter names; never the network.

    A name that is no directory is looked up in the hub cache.
    """
    named = adapter_base(adapter)
    base = Path(base_model or named).expanduser()
    if named and not base_model:
        base = named_base(adapter) or base
    if not (base_model or named) or not base.is_dir():
        told = f"policy.base_model says {str(base_model)!r}" if base_model else f"it names {named!r}"
        told = told if base_model or named else "its files name none"
        raise CheckpointError(
            f"the base model of the adapter in {adapter} is not on this machine: {told}"
            + (", which is no directory here, nor in the hub cache" if base_model or named else ""),
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
    if not has & _MODEL_FILES:
        pickled = sorted(name for name in has if name.startswith("pytorch_model") and ".bin" in name)
        raise CheckpointError(
            f"{directory} has no weights: neither model.safetensors nor model.safetensors.index.json",
            fix=f"convert {pickled[0]} to safetensors" if pickled else SAVE_AGAIN,
        )

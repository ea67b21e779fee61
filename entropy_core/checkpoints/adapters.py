"""LoRA adapters as PEFT saves them, put into a base model in place.

    insert_adapter    the adapter's layers into a model; from then on only what was trained requires a gradient
    check_adapter     the saved tensors are those of these layers; only headers are read
    fill_adapter      the saved weights into the layers

The layers are replaced inside the base model, which stays what it was otherwise: its trunk, its head, its names of
parameters. PEFT's own wrapper, whose `base_model` means something else, is never made. Nothing is merged: the step is
the one that the trainer takes in the adapter's parameters. The only importer of peft.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from entropy_core.checkpoints.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LORA_META,
    adapter_settings,
    adapter_tensors,
    load_adapter,
)
from entropy_core.checkpoints.dora import let_norms_move
from entropy_core.checkpoints.residual_base import FACTORS_OF, FAR, NEAR, Layer, distance, taken_out
from entropy_core.errors import CheckpointError, one_line, shortage, some_names
from entropy_core.files.checkpoint import SAVE_AGAIN

if TYPE_CHECKING:
    from peft import LoraConfig

_PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base weights alone
_REFUSED = {
    "use_qalora": "QALoRA, which belongs to quantised base weights",
    "alora_invocation_tokens": "activated LoRA, which is another policy before and after its invocation",
    "layer_replication": "layer replication, which shares base weights between layers",
    "megatron_config": "Megatron's parallel layers",
}
_PLAIN_LORA = "train with plain LoRA, or merge the adapter into its base and probe that with `optimizer_state: fresh`"


def insert_adapter(model: nn.Module, directory: Path) -> None:
    """Replace layers of a base model by those of an adapter, on the device of the base and untrained.

    LoRA with ranks and scales per layer, biases, `modules_to_save`, `trainable_token_indices` and tied embeddings;
    DoRA, rank-stabilised LoRA.

    Args:
        model: a base model of transformers; may be on the meta device. It is changed in place: what the adapter trains
            requires a gradient afterwards, and nothing else does.
        directory: of the adapter, see `adapter_files`.

    Raises:
        CheckpointError: the configuration is no JSON, is not of LoRA, is of a variant whose step would be predicted
            wrong, or does not fit the model.
    """
    from peft import inject_adapter_in_model

    config = _read_config(directory)
    _resize_vocabulary(model, directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to those who train, about merging and tied weights
            inject_adapter_in_model(config, model)
    except Exception as error:
        raise shortage(error) or CheckpointError(
            f"the adapter of {directory} does not fit into its base model: {one_line(error)}",
            cause="the base is another model than the adapter was trained on",
            fix="set `policy.base_model` to the base that it was trained on",
        ) from error
    if getattr(config, "target_modules_to_tie", None):
        raise _refusal(directory, "LoRA factors that the embedding shares with the head (ensure_weight_tying)")
    if other := let_norms_move(model):
        raise _refusal(directory, f"DoRA on layers that are not linear ones: {some_names(other)}")
    _untie_containers(model)


def check_adapter(model: nn.Module, directory: Path) -> None:
    """Verify that the saved tensors are those of the adapter's layers, and that every trained parameter is among them.

    Args:
        model: after `insert_adapter`; may be on the meta device.
        directory: of the adapter.

    Raises:
        CheckpointError: the file is damaged, tensors are missing, left over, or of another shape; names them.
    """
    stored = adapter_tensors(directory)
    saved = as_saved(model)
    if missing := [name for name in saved if name not in stored]:
        raise CheckpointError(
            f"{directory}/{ADAPTER_WEIGHTS} has no weights for {some_names(missing)}",
            cause="an incomplete save, or an adapter_config.json of another adapter",
            fix=SAVE_AGAIN,
        )
    frozen = dict(model.named_parameters(remove_duplicate=False))  # PEFT saves an embedding beside its LoRA factors
    shapes = {name: tuple(tensor.shape) for name, tensor in (frozen | saved).items()}
    if extra := [name for name in stored if name not in shapes]:
        raise CheckpointError(
            f"{directory}/{ADAPTER_WEIGHTS} holds tensors that the adapter does not have: {some_names(extra)}",
            cause="an adapter_config.json of another adapter, or another base model",
            fix="set `policy.base_model` to the base that it was trained on",
        )
    if wrong := [f"{n} {of.shape} (here {shapes[n]})" for n, of in stored.items() if of.shape != shapes[n]]:
        raise CheckpointError(
            f"{directory}: the adapter has other shapes than its base and its ranks give: {some_names(wrong)}",
            cause="an adapter of another base model, or a vocabulary that was resized for the training",
            fix="set `policy.base_model` to the base that it was trained on",
        )
    held = {id(tensor) for tensor in saved.values()}
    if unsaved := [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]:
        raise CheckpointError(
            f"PEFT did not save all that was trained: {some_names(unsaved)} of {directory}",
            cause="an adapter that trains parameters outside of its layers",
            fix=_PLAIN_LORA,
        )


def fill_adapter(model: nn.Module, directory: Path) -> None:
    """Put the saved weights into the adapter's layers, in the dtype of the base.

    Args:
        model: after `insert_adapter`, not on the meta device.
        directory: of the adapter.

    Raises:
        CheckpointError: as `check_adapter` does.
    """
    from peft import set_peft_model_state_dict

    check_adapter(model, directory)
    set_peft_model_state_dict(model, load_adapter(directory))
    initialised = adapter_settings(directory).get("init_lora_weights", True)
    if _changes_base(initialised):
        _take_out_of_base(model, directory, initialised)


def what_adapter_is(directory: Path) -> tuple[str, ...]:
    """What is to be said about an adapter whose step or base is not that of plain LoRA, one sentence each."""
    values = adapter_settings(directory)
    said: tuple[str, ...] = ()
    if not (directory / ADAPTER_CONFIG).exists():
        said += (
            f"The adapter is in shards, with the rank and the alpha of {LORA_META}; it is taken to be plain LoRA.",
        )
    if values.get("use_dora"):
        said += (
            "DoRA: the trainer's gradient holds the norms of the weights fixed, and so does that on U; derivatives of "
            "the entropy let them move, as they do when the step is taken.",
        )
    if _changes_base(values.get("init_lora_weights", True)):
        said += (
            f"The adapter began as {values['init_lora_weights']}, which takes its factors out of the base: if they "
            "are in the base that is on disk, they are taken out of it here; if not, it is the residual base already.",
        )
    return said


def _changes_base(initialised: Any) -> bool:
    return isinstance(initialised, str) and (initialised in FACTORS_OF or initialised.startswith("pissa_niter_"))


def _take_out_of_base(model: nn.Module, directory: Path, initialised: str) -> None:
    """Make the residual base, if it is not there yet."""
    from peft.tuners.lora import Linear

    with torch.no_grad():
        layers: list[tuple[Tensor, Tensor]] = []
        distances = []
        for name, module in model.named_modules():
            if not isinstance(module, Linear):
                continue
            turned = bool(module.fan_in_fan_out)
            if turned and initialised == "olora":
                raise _refusal(directory, f"OLoRA on {name}, whose weight is stored the other way round")
            weight = module.get_base_layer().weight.data
            added = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
            layer = Layer(weight.T if turned else weight, added, module.r["default"], module.scaling["default"])
            began = taken_out(layer, initialised)
            distances.append(distance(layer, began))
            layers.append((weight, (began.T if turned else began).to(weight.dtype)))
        near, far = (sum(d <= NEAR for d in distances), sum(d >= FAR for d in distances))
        if near == len(distances) and initialised in FACTORS_OF:
            for weight, began in layers:
                weight -= began
        elif far < len(distances):
            raise CheckpointError(
                f"the adapter of {directory} began as {initialised}, and its base is neither the one that this was "
                f"computed from nor the residual one: {near} of {len(distances)} layers are still near their beginning",
                cause="another base model, an initialisation that is random, or a long training",
                fix="save the residual base (the model without its adapter) and set `policy.base_model` to it",
            )


def _read_config(directory: Path) -> "LoraConfig":
    from peft import LoraConfig

    path = directory / ADAPTER_CONFIG
    values = adapter_settings(directory)
    if values.get("peft_type") != "LORA":
        raise _refusal(directory, f"peft_type {values.get('peft_type')!r}")
    initialised = values.get("init_lora_weights", True)
    if initialised not in _PLAIN_INITIALISATIONS and not _changes_base(initialised):
        raise _refusal(directory, f"init_lora_weights {initialised!r}, which changes the base weights")
    known = LoraConfig.__dataclass_fields__
    variants = {name: name for name, of in known.items() if of.metadata.get("is_lora_variant") and name != "use_dora"}
    variants |= _REFUSED
    if asked := [reason for name, reason in variants.items() if values.get(name)]:
        raise _refusal(directory, "; ".join(asked))
    if unknown := [name for name, value in values.items() if name not in known and value]:
        fact = f"{path} has settings that the installed peft does not know: {some_names(unknown)}"
        raise CheckpointError(fact, cause="saved by a newer version", fix="install the peft that trained it")
    # How the weights were initialised no longer matters; plainly is the quickest.
    taken = {name: value for name, value in values.items() if name in known and not name.endswith("_config")}
    try:
        return LoraConfig(**taken | {"inference_mode": False, "init_lora_weights": True})
    except (TypeError, ValueError) as error:
        fact = f"{path} is not a configuration of LoRA: {one_line(error)}"
        raise CheckpointError(fact, cause="the file was edited", fix=SAVE_AGAIN) from error


def _resize_vocabulary(model: Any, directory: Path) -> None:
    """Give the base as many tokens as the adapter was trained with; their embeddings are in the adapter's file."""
    embedding = model.get_input_embeddings()
    (name,) = [name for name, module in model.named_modules() if module is embedding]
    stored = adapter_tensors(directory)
    for saved_as in (f"{name}.weight", f"{name}.base_layer.weight", f"{name}.original_module.weight"):
        of = stored.get(saved_as)
        if of and len(of.shape) == 2 and of.shape[0] != embedding.weight.shape[0]:
            with torch.random.fork_rng(devices=[]):
                model.resize_token_embeddings(of.shape[0], mean_resizing=False)
            return


def _refusal(directory: Path, what: str) -> CheckpointError:
    return CheckpointError(f"the adapter of {directory} uses {what}, and is not probed", fix=_PLAIN_LORA)


def as_saved(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's name for each tensor that it would save, and the model's own tensor."""
    from peft import get_peft_model_state_dict

    everything: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return get_peft_model_state_dict(model, state_dict=everything, save_embedding_layers=False)


def _untie_containers(model: nn.Module) -> None:
    """Give each of two tied token adapters its own container of the one parameter that they share.

    `torch.func.functional_call` swaps tensors by name: of a container with two names it would put back its own tensor.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is not None:
            module.trainable_tokens_delta = nn.ParameterDict(module.trainable_tokens_delta)

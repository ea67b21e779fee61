"""The parameters of a checkpoint's model: names, shapes, which of them are trained; no weight is loaded.

The model is built on the meta device from its configuration, an adapter's layers are put into it, and the stored
tensors are compared with it by their headers.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from entropy_core.checkpoints.adapter_files import PEFT_PREFIX, adapter_tensors
from entropy_core.checkpoints.adapters import (
    as_saved,
    check_adapter,
    insert_adapter,
    what_adapter_is,
)
from entropy_core.checkpoints.content import StoredTensor, read_json, stored_tensors
from entropy_core.checkpoints.layout import Layout
from entropy_core.checkpoints.model_config import check_generation_config, check_model_config
from entropy_core.checkpoints.quantised_base import as_dense, quantised_by
from entropy_core.checkpoints.shards import tensors_in_shards
from entropy_core.errors import CheckpointError, one_line, shortage, some_names
from entropy_core.files.checkpoint import SAVE_AGAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The patterns of Trainer.get_decay_parameter_names, whose module cannot be imported without accelerate.
NO_DECAY_PATTERNS = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
WRAPPER_PREFIXES = ("module.", "_orig_mod.", PEFT_PREFIX)  # DistributedDataParallel, torch.compile, PEFT
FLOATS = ("F64", "F32", "BF16", "F16")  # what safetensors calls the dtypes that can be widened

Shapes = dict[str, tuple[int, ...]]


class Architecture(NamedTuple):
    """The parameters of a model; each tied one once, under its first name, in `named_parameters()` order.

    Attributes:
        trained: those that the trainer trains: all of a full model, an adapter's otherwise.
        everything: all of them, those of an adapter included.
        of_model: all of them before an adapter is put in.
        first_name: every name of a parameter → the one in `everything`.
        buffers: what else a state dict may hold.
        decay: the trained ones of the Trainer's first group, which decays.
        no_decay: those of its second.
        saved_as: dtype of the stored parameters, as safetensors names it, where they are stored under their own names.
        vocabulary: number of tokens.
        saved_by: version of transformers in config.json.
        read_by: version that is installed.
    """

    trained: Shapes
    everything: Shapes
    of_model: Shapes
    first_name: dict[str, str]
    buffers: set[str]
    decay: tuple[str, ...]
    no_decay: tuple[str, ...]
    saved_as: dict[str, str]
    vocabulary: int
    saved_by: str | None
    read_by: str

    def model_name(self, name: str) -> str:
        """The model's name for a saved one: without the prefixes of wrappers, tied weights under their first name."""
        bare = name
        while bare not in self.first_name:
            prefix = next((prefix for prefix in WRAPPER_PREFIXES if bare.startswith(prefix)), None)
            if prefix is None:
                return name
            bare = bare.removeprefix(prefix)
        return self.first_name[bare]


def read_architecture(layout: Layout) -> tuple[Architecture, tuple[str, ...]]:
    """Build the model without storage, and verify that the stored tensors are its own.

    Args:
        layout: of the checkpoint.

    Returns:
        The architecture; and what is to be said about the weights, one sentence each.

    Raises:
        CheckpointError: the configuration describes no model, the adapter does not fit it, or tensors are missing, left
            over, of another shape, or quantised; names them.
    """
    import transformers
    from transformers.trainer_pt_utils import get_parameter_names

    stored = _in_shards(layout.shards) if layout.shards else stored_tensors(layout.architecture)
    quantised = quantised_by(layout.architecture) if layout.base is not None else ""
    if quantised:
        stored = as_dense(layout.architecture, stored)
    model = _empty_model(layout.architecture, len(stored), bool(quantised))
    of_model = _shapes(model)
    check_generation_config(layout.architecture, model.get_input_embeddings().weight.shape[0])
    said = _check_weights(layout.shards or layout.architecture, model, stored)
    if quantised:
        said += (
            f"The base is quantised in {quantised} by bitsandbytes; its weights are dequantised"
            + (
                ", and its rounding of activations is left out." if quantised == "8 bits" else ", as in its own layers."
            ),
        )
    if layout.base is not None:
        insert_adapter(model, layout.model)
        check_adapter(model, layout.model)
        said += what_adapter_is(layout.model)
        stored |= adapter_tensors(layout.model)
    first = {id(p): name for name, p in model.named_parameters()}
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    decays = set(get_parameter_names(model, [torch.nn.LayerNorm], list(NO_DECAY_PATTERNS)))
    first_name = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    named = first_name
    if layout.base is not None:  # PEFT's files have names of their own
        named = first_name | {
            name: first[id(tensor)] for name, tensor in as_saved(model).items() if id(tensor) in first
        }
    architecture = Architecture(
        trained=trained,
        everything=_shapes(model),
        of_model=of_model,
        first_name=first_name,
        buffers={name for name, _ in model.named_buffers()},
        decay=tuple(name for name in trained if name in decays),
        no_decay=tuple(name for name in trained if name not in decays),
        saved_as={named[name]: of.dtype for name, of in stored.items() if name in named},
        vocabulary=model.get_input_embeddings().weight.shape[0],
        saved_by=str(getattr(model.config, "transformers_version", None) or "") or None,
        read_by=transformers.__version__,
    )
    return architecture, (*said, *_precision(layout, stored))


def _in_shards(place: Path) -> dict[str, StoredTensor]:
    """The headers of weights in shards. Raises CheckpointError if an adapter's are among them."""
    stored = tensors_in_shards(place)
    if factors := [name for name in stored if ".lora_" in name]:
        raise CheckpointError(
            f"{place} holds an adapter in its shards ({some_names(factors)}), and no adapter is saved beside them",
            cause="verl, or the Trainer with a sharded state dict: neither always writes the adapter's configuration",
            fix="save the adapter with PEFT's save_pretrained into the checkpoint (verl: into lora_adapter/, as "
            "`python -m verl.model_merger merge --backend fsdp` does; correct its lora_alpha)",
        )
    return stored


def module_names(directory: Path) -> list[str]:
    """The names of the modules of a model, without an adapter. Raises CheckpointError as `read_architecture` does."""
    model = _empty_model(directory, len(stored_tensors(directory)), bool(quantised_by(directory)))
    return [name for name, _ in model.named_modules()]


def _empty_model(directory: Path, tensors: int, dequantised: bool) -> "PreTrainedModel":
    import transformers

    check_model_config(directory)
    if not dequantised and "quantization_config" in read_json(directory / "config.json"):
        raise CheckpointError(
            f"{directory}/config.json has a quantization_config, and quantised weights have no derivative",
            fix="probe the model that was quantised; for an adapter, set `policy.base_model` to it",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if dequantised:
            del config.quantization_config
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > tensors:  # a million of them take minutes, and no file has them
            raise ValueError(f"it says {layers} layers, and the files hold {tensors} tensors")
        with torch.device("meta"):
            # An explicit dtype leaves torch's process-wide default alone.
            return transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=torch.get_default_dtype(), trust_remote_code=False
            )
    except Exception as error:
        raise shortage(error) or CheckpointError(
            f"{directory}/config.json does not describe a causal language model of transformers "
            f"{transformers.__version__}: {one_line(error)}",
            cause="a newer or a custom architecture",
            fix="install the version of transformers that trained it; custom code is not run",
        ) from error


def _shapes(model: torch.nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _check_weights(directory: Path, model: "PreTrainedModel", stored: dict[str, StoredTensor]) -> tuple[str, ...]:
    """Every parameter is in the files with its shape; what transformers renames on loading must at least add up."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    if wrong := [
        f"{name} {stored[name].shape} (config: {shape})"
        for name, shape in shapes.items()
        if name in stored and stored[name].shape != shape
    ]:
        raise CheckpointError(
            f"{directory}: the weights have other shapes than config.json says: {some_names(wrong)}",
            cause="config.json and weights of two different models",
            fix=SAVE_AGAIN,
        )
    present = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in stored}
    missing = [name for name, p in model.named_parameters() if id(p) not in present]
    if not missing:
        return ()
    buffers = {name for name, _ in model.named_buffers()}
    renamed = [of.shape for name, of in stored.items() if name not in shapes and name not in buffers]
    if sum(map(math.prod, renamed)) < sum(math.prod(shapes[name]) for name in missing):
        raise CheckpointError(
            f"{directory}: no weights for {some_names(missing)}",
            cause="an incomplete save, or config.json of another model",
            fix=SAVE_AGAIN,
        )
    return (f"The files store {len(missing)} parameters under other names, for transformers to convert.",)


def _precision(layout: Layout, stored: dict[str, StoredTensor]) -> tuple[str, ...]:
    """What to say of weights that are narrower than they are computed with; quantised ones are refused."""
    dtypes = {of.dtype for of in stored.values()}
    if quantised := sorted(dtypes - {*FLOATS, "BOOL", "I64"}):  # the last two are masks and positions
        raise CheckpointError(
            f"{layout.architecture} stores weights as {', '.join(quantised)}, and quantised weights have no derivative",
            fix="probe the model that was quantised",
        )
    narrow = sorted(dtypes & {"BF16", "F16"})
    if not narrow:
        return ()
    return (f"Weights are saved as {' and '.join(narrow)} and widened to policy.dtype for every pass.",)

"""load-weights: weights that lie in shards, in one file that transformers can open."""

import shutil
from typing import TYPE_CHECKING, Any

from entropy_core.checkpoints.architecture import read_architecture
from entropy_core.checkpoints.layout import find_layout
from entropy_core.checkpoints.shards import read_shards
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import description_files

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer


def load_weights(out: "Writer", execution: "Execution", *, checkpoint: str, description: str) -> dict[str, Any]:
    """Write the model of a checkpoint whose trainer keeps its weights in shards.

    Args:
        out: writer of the folder `model/`: `model.safetensors`, in the dtype that the weights were saved in, and the
            files of the model's configuration and tokenizer.
        execution: path of the checkpoint and of the description.
        checkpoint: content digest of the checkpoint's files.
        description: content digest of the model's configuration and tokenizer.

    Returns:
        Summary: number of tensors and of numbers in them.
    """
    home = execution.paths[description]
    layout = find_layout(execution.paths[checkpoint], home, fresh=True)
    if layout.shards is None:
        fact = f"{layout.directory} has its weights in files of their own"
        raise CheckpointError(fact, cause="it was changed", fix="run the sweep again")
    architecture, _ = read_architecture(layout)
    names = {*architecture.first_name, *architecture.buffers}
    weights = {name: tensor for name, tensor in read_shards(layout.shards).items() if name in names}
    for name in description_files(home):
        shutil.copyfile(home / name, out.path(f"model/{name}"))
    out.tensors(weights, "model/model.safetensors", {"format": "pt"})
    return {"tensors": len(weights), "numbers": sum(tensor.numel() for tensor in weights.values())}

"""load-weights: weights that lie in shards, in one file that transformers can open."""

import math
import shutil
from typing import TYPE_CHECKING, Any

import torch

from entropy_core.checkpoints.architecture import read_architecture
from entropy_core.checkpoints.layout import find_layout
from entropy_core.checkpoints.shards import read_shards, tensors_in_shards
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import description_files
from entropy_core.store.data_files import VECTORS

if TYPE_CHECKING:
    from entropy_core.execution import Execution
    from entropy_core.store.artifact import Writer


def load_weights(out: "Writer", execution: "Execution", *, checkpoint: str, description: str) -> dict[str, Any]:
    """Write the model of a checkpoint whose trainer keeps its weights in shards.

    Args:
        out: receives `model.safetensors` among its vectors, in the widest dtype that a weight was saved in, and
            beside it the files of the model's configuration and tokenizer.
        execution: path of the checkpoint and of the description.
        checkpoint: content digest of the checkpoint's files.
        description: content digest of the model's configuration and tokenizer.

    Returns:
        Summary: number of tensors and of numbers in them.
    """
    home = execution.paths[description]
    layout = find_layout(execution.paths[checkpoint], home, fresh=True, masters=True)
    if layout.shards is None:
        fact = f"{layout.directory} has its weights in files of their own"
        raise CheckpointError(fact, cause="it was changed", fix="run the sweep again")
    read_architecture(layout)  # which refuses weights of another model
    for name in description_files(home):
        shutil.copyfile(home / name, out.path(f"{VECTORS}{name}"))
    stored = tensors_in_shards(layout.shards)
    shapes = {name: of.shape for name, of in stored.items()}
    dtypes = {of.dtype for of in stored.values()}
    dtype = torch.float64 if "F64" in dtypes else torch.bfloat16 if dtypes == {"BF16"} else torch.float32
    with out.vector("model", shapes, dtype) as file:
        for block, values in read_shards(layout.shards):
            file.write(block, values)
    return {"tensors": len(shapes), "numbers": sum(map(math.prod, shapes.values()))}

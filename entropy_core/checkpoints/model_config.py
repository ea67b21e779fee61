"""What a model's config.json and generation_config.json may not say, before transformers reads them.

transformers takes an unreadable generation config for none, a name with a slash for an attention kernel on the hub, and
the weights from where `transformers_weights` says, be it another folder.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entropy_core.checkpoints.content import read_json
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import SAVE_AGAIN

GENERATION = "generation_config.json"


def check_model_config(directory: Path) -> None:
    """Refuse a config.json that asks for code, kernels or weights from elsewhere.

    Args:
        directory: of a model.

    Raises:
        CheckpointError: it does, or it cannot be read.
    """
    for key, value in _entries(read_json(directory / "config.json")):
        if key == "transformers_weights" and value not in (None, "model.safetensors", "model.safetensors.index.json"):
            raise CheckpointError(
                f"{directory}/config.json has the weights in {value!r}, and they are read from model.safetensors",
                cause="it belongs to another folder, or was edited",
                fix="remove transformers_weights, and have the weights in model.safetensors",
            )
        if key.endswith("_implementation") and "/" in json.dumps(value):  # one name, or one for each part of the model
            raise CheckpointError(
                f"{directory}/config.json asks for {key} {value!r}, which is code on the hub",
                cause="it was trained with that kernel, or the file was edited",
                fix=f"remove {key}: attention is computed with kernels that have a derivative",
            )


def check_generation_config(directory: Path, vocabulary: int) -> None:
    """Refuse a generation config that cannot be read, or ends a response with what is no token.

    Args:
        directory: of a model.
        vocabulary: rows of its embedding.

    Raises:
        CheckpointError: as above. That there is none is no error.
    """
    path = directory / GENERATION
    if not os.path.lexists(path):  # a link that leads nowhere is no config that is not there
        return
    said = read_json(path).get("eos_token_id")
    ids = said if isinstance(said, list) else [] if said is None else [said]
    if wrong := [token for token in ids if type(token) is not int or not 0 <= token < vocabulary]:
        raise CheckpointError(
            f"{path} says that {wrong[0]!r} ends a response, and the model has tokens 0 to {vocabulary - 1}",
            cause="it belongs to another model, or was damaged",
            fix=SAVE_AGAIN,
        )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested objects, and what it has."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)

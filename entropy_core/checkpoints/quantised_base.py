"""The weights of a base that bitsandbytes has quantised, as its forward pass computes with them.

    4 bits   w_i = map[code_i]·s[i // 64], two codes in a byte, the first in the upper half; rounded to the dtype that
             the weights had. The scales s may be quantised themselves: s_j = map'[code'_j]·s'[j // 256] + offset
    8 bits   w_ij = code_ij·s_i/127, s_i the largest number of row i

In 4 bits the layer multiplies by exactly this weight. In 8 bits it rounds its inputs to 8 bits as well, which is not
done here.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.checkpoints.content import StoredTensor, load_tensor, read_json
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import SAVE_AGAIN

_STATE = re.compile(r"(.+\.weight)\.quant_state\.bitsandbytes__(nf4|fp4)")
_ASIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class _FourBits(NamedTuple):
    """Of a weight, as bitsandbytes writes it down beside the codes."""

    shape: tuple[int, ...]
    dtype: str
    block: int
    nested_block: int
    nested_offset: float


def quantised_by(directory: Path) -> str:
    """How bitsandbytes has quantised a model: in 4 or 8 bits; empty if it has not.

    Raises:
        CheckpointError: it is quantised in another way.
    """
    said = read_json(directory / "config.json").get("quantization_config")
    if said is None:
        return ""
    method = said.get("quant_method") if isinstance(said, dict) else said
    bits = [bits for bits in ("4", "8") if isinstance(said, dict) and said.get(f"load_in_{bits}bit")]
    if method != "bitsandbytes" or len(bits) != 1:
        raise CheckpointError(
            f"{directory}/config.json has a quantization_config of {method}, which is not read",
            cause="GPTQ, AWQ, or another quantisation than bitsandbytes' in 4 or 8 bits",
            fix="probe the model that was quantised; for an adapter, set `policy.base_model` to it",
        )
    return f"{bits[0]} bits"


def as_dense(directory: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The headers of quantised weights as if they were dense.

    Args:
        directory: of the model.
        stored: what its files hold, from `content.stored_tensors`.

    Returns:
        By name, without what belongs to the codes.

    Raises:
        CheckpointError: the codes or their scales are damaged.
    """
    found = dict(stored)
    for name, of in stored.items():
        if match := _STATE.fullmatch(name):
            four = _read_state(directory / of.file, name)
            codes = stored.get(match[1])
            if codes is None or codes.dtype != "U8" or math.prod(codes.shape) != -(-math.prod(four.shape) // 2):
                raise _damaged(directory, match[1])
            found[match[1]] = StoredTensor(four.shape, _NAMES[four.dtype], codes.file)
            for key in (f"quant_state.bitsandbytes__{match[2]}", *_ASIDE):
                found.pop(f"{match[1]}.{key}", None)
        elif name.endswith(".SCB"):
            weight = name.removesuffix("SCB") + "weight"
            codes = stored.get(weight)
            if codes is None or codes.dtype != "I8" or of.shape != codes.shape[:1]:
                raise _damaged(directory, weight)
            found[weight] = StoredTensor(codes.shape, "F32", codes.file)
            for key in ("SCB", "weight_format"):
                found.pop(f"{name.removesuffix('SCB')}{key}", None)
    return found


def dense_weights(directory: Path, stored: dict[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """All weights, one at a time, dequantised.

    Args:
        directory: of the model.
        stored: what its files hold, from `content.stored_tensors`.

    Returns:
        Names and tensors, in the dtype that `as_dense` says.

    Raises:
        CheckpointError: the codes or their scales are damaged.
    """

    def read(name: str) -> Tensor:
        return load_tensor(directory / stored[name].file, name)

    states = {match[1]: name for name in stored if (match := _STATE.fullmatch(name))}
    for name in as_dense(directory, stored):
        scales = name.removesuffix("weight") + "SCB"
        try:
            if name in states:
                parts = {key: read(f"{name}.{key}") for key in _ASIDE if f"{name}.{key}" in stored}
                yield name, _of_four_bits(read(name), parts, _read_state(directory / stored[name].file, states[name]))
            elif scales in stored:
                layout = scales.removesuffix("SCB") + "weight_format"
                if layout in stored and int(read(layout)) != 0:
                    raise ValueError("in an order of columns that a GPU has")
                yield name, read(name).float() * (read(scales).float() / 127)[:, None]
            else:
                yield name, read(name)
        except (ValueError, KeyError, IndexError, RuntimeError) as error:
            raise _damaged(directory, name) from error


def _of_four_bits(codes: Tensor, parts: dict[str, Tensor], of: _FourBits) -> Tensor:
    absmax = parts["absmax"]
    if "nested_absmax" in parts:
        places = torch.arange(absmax.numel()) // of.nested_block
        absmax = parts["nested_quant_map"][absmax.long()] * parts["nested_absmax"][places] + of.nested_offset
    pairs = codes.reshape(-1)
    numbers = torch.stack([pairs >> 4, pairs & 15], -1).view(-1)[: math.prod(of.shape)]
    scales = absmax.float()[torch.arange(numbers.numel()) // of.block]
    values = parts["quant_map"].float()[numbers.long()] * scales
    return values.to(getattr(torch, of.dtype)).view(of.shape)


def _read_state(file: Path, name: str) -> _FourBits:
    """The JSON that lies in a tensor of bytes."""
    try:
        text = load_tensor(file, name)
        if text.dtype != torch.uint8 or text.ndim != 1:
            raise ValueError("no bytes")
        said: dict[str, Any] = json.loads(bytes(text.tolist()))
        shape = tuple(said["shape"])
        blocks = said["blocksize"], said.get("nested_blocksize") or 1
        whole = all(type(size) is int and size > 0 for size in (*shape, *blocks))
        if not whole or said["dtype"] not in _NAMES:
            raise ValueError(said["dtype"])
        return _FourBits(shape, said["dtype"], *blocks, float(said.get("nested_offset") or 0.0))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise _damaged(file, name) from error


def _damaged(place: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{place}: the codes of {name} and what belongs to them do not fit together",
        cause="an incomplete save, or a version of bitsandbytes that stores them in another way",
        fix=SAVE_AGAIN,
    )

"""The cache of a batch whose rows are dropped and given to other sequences while it decodes.

    Columns    keys and values of attention, a column per token
    States     what a convolution or a linear attention carries from token to token, the same size at any length
    Both       layers with an attention and a state side by side
    Empty      layers that keep nothing

All layers have `keep`, `replace` and `size`.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)


def _beside(rows: Tensor | slice, states: Tensor) -> Tensor | slice:
    """Rows to select, on the device of what they are selected of."""
    return rows if isinstance(rows, slice) else rows.to(states.device)


ROOM = 64  # columns by which a full buffer grows


class Columns(DynamicLayer):
    """Keys and values [rows, heads, columns, width] of a layer, as views of buffers with spare columns."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns and return all columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [states[:, :, :0] for states in (key_states, value_states)]
        first = self.get_seq_length()
        last = first + key_states.shape[2]
        if last > self._buffers[0].shape[2]:
            self._copy(slice(None), 0, first, last + ROOM)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, first:last] = states
        return self._show(last)

    def keep(self, rows: Tensor | slice, first: int) -> None:
        """Keep only these rows, and only the columns from `first` on."""
        last = self.get_seq_length()
        self._copy(rows, first, last, last - first + ROOM)
        self._show(last - first)

    def replace(self, rows: Tensor, fresh: "Columns") -> None:
        """Overwrite rows with the cache of new sequences, which also end in the newest column."""
        last, new = self.get_seq_length(), fresh.get_seq_length()
        for buffer, states in zip(self._buffers, (fresh.keys, fresh.values), strict=True):
            buffer[_beside(rows, buffer), :, last - new : last] = states

    def size(self, columns: int) -> int:
        """Bytes of a cache of one row, if it had this many columns."""
        return (self.keys.nbytes + self.values.nbytes) // self.get_seq_length() * columns

    def _copy(self, rows: Tensor | slice, first: int, last: int, room: int) -> None:
        for i, buffer in enumerate(self._buffers):
            kept = buffer[_beside(rows, buffer), :, first:last]
            self._buffers[i] = kept.new_zeros(*kept.shape[:2], room, kept.shape[3])
            self._buffers[i][:, :, : last - first] = kept

    def _show(self, columns: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self._buffers)
        return self.keys, self.values


class States(LinearAttentionLayer):
    """Convolution and recurrent states of a layer, each [rows, …]; after a prefill, those of its last token."""

    def keep(self, rows: Tensor | slice, first: int) -> None:
        """Keep only these rows; there are no columns."""
        for states in (self.conv_states, self.recurrent_states):
            for i, state in states.items():
                states[i] = None if state is None else state[_beside(rows, state)]

    def replace(self, rows: Tensor, fresh: "States") -> None:
        """Overwrite rows with the states of new sequences."""
        pairs = (self.conv_states, fresh.conv_states), (self.recurrent_states, fresh.recurrent_states)
        for states, new in pairs:
            for i, state in states.items():
                if state is not None:
                    state[_beside(rows, state)] = new[i]

    def size(self, columns: int) -> int:
        """Bytes of the states of one row."""
        states = [*self.conv_states.values(), *self.recurrent_states.values()]
        return sum(state.nbytes for state in states if state is not None)


class Both(States, Columns):
    """An attention and a state side by side."""

    def __init__(self, number_of_states: int = 1, **_: Any) -> None:
        Columns.__init__(self)
        States.__init__(self, number_of_states=number_of_states)  # type: ignore[call-arg]

    def lazy_initialization(self, *args: Tensor, **kwargs: Any) -> None:
        """Of the attention, which gives keys and values, or of a state, which is named."""
        if args:
            Columns.lazy_initialization(self, *args)
        else:
            States.lazy_initialization(self, **kwargs)

    def keep(self, rows: Tensor | slice, first: int) -> None:
        """Keep only these rows, and only the columns from `first` on."""
        States.keep(self, rows, first)
        Columns.keep(self, rows, first)

    def replace(self, rows: Tensor, fresh: "Both") -> None:
        """Overwrite rows with the cache of new sequences."""
        States.replace(self, rows, fresh)
        Columns.replace(self, rows, fresh)

    def size(self, columns: int) -> int:
        """Bytes of a cache of one row, if it had this many columns."""
        return States.size(self, columns) + Columns.size(self, columns)


class Empty(DummyLayer):
    """A layer that keeps nothing."""

    def keep(self, rows: Tensor | slice, first: int) -> None:
        """Nothing to keep."""

    def replace(self, rows: Tensor, fresh: "Empty") -> None:
        """Nothing to overwrite."""

    def size(self, columns: int) -> int:
        """Nothing."""
        return 0


_LAYERS: dict[str, Any] = {
    **dict.fromkeys(("conv", "linear_attention"), States),
    **dict.fromkeys(("hybrid", "hybrid_sliding"), Both),
    "dummy": Empty,
}
"""Kinds of layers, as transformers names them; all others are attentions, whose masks make the windows."""


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache with the layers that a model needs."""
    kinds, settings = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    if not {*kinds} & {*_LAYERS} - {"dummy"}:
        return Cache(layer_class_to_replicate=Columns)
    return Cache(
        layers=[
            _LAYERS[kind](**of_one) if kind in _LAYERS else Columns()
            for kind, of_one in zip(kinds, settings, strict=True)
        ]
    )

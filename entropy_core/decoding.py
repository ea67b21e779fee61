"""Continuous batching: many responses, decoded in the rows of one batch whose places are refilled as responses end.

The key-value cache is aligned on the right: every row ends in the newest column, and what lies before its prompt is
masked. So a row can be given to another prompt at any time, no row waits for the longest response of its batch, and
nothing is asked of an architecture but that it knows padding on the left. Waiting prompts are sorted by length, the
longest first, so that a new one always fits into the columns that are there.

Columns that no row needs any more are dropped, and once nothing waits, so are rows. What is drawn for a sequence is a
function of (seed, purpose, sequence id, position), so none of this changes the draws.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from entropy_core.errors import NonFiniteError
from entropy_core.numerics import philox
from entropy_core.numerics.philox import Purpose
from entropy_core.policy import Policy

FinishReason = Literal["eos", "stop", "length"]

ROOM = 64  # columns by which a full buffer grows
STALE_COLUMNS = 16  # that no row needs: from so many on they are dropped
REFILL = 16  # rows are given out again when one in so many is free: prefilling one at a time reads all weights for it
SPARSE = 0.75  # rows are dropped when no more than this share of them is busy
CACHE_SHARE = 0.5  # of the memory that is free before the first prompt


@dataclass(frozen=True)
class DecodingRequest:
    """What to decode: a prompt with its sequence id each, and which draws are theirs."""

    prompts: Sequence[Sequence[int]]
    sequence_ids_N: Tensor
    seed: int
    purpose: Purpose
    temperature: float
    max_new_tokens: int
    stop_strings: Sequence[str] = ()


class Response(NamedTuple):
    """Token ids and why they end there; an EOS that was sampled is the last of them."""

    tokens: list[int]
    finish_reason: FinishReason


class _Layer(DynamicLayer):
    """Keys and values [rows, heads, columns, width] of a layer, as views of buffers with room for more columns."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns; all columns."""
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
        """Only these rows, and only the columns from `first` on."""
        last = self.get_seq_length()
        self._copy(rows, first, last, last - first + ROOM)
        self._show(last - first)

    def replace(self, rows: Tensor, fresh: "_Layer") -> None:
        """Give rows to other sequences, which end in the newest column like all."""
        last, new = self.get_seq_length(), fresh.get_seq_length()
        for buffer, states in zip(self._buffers, (fresh.keys, fresh.values), strict=True):
            buffer[rows, :, last - new : last] = states

    def _copy(self, rows: Tensor | slice, first: int, last: int, room: int) -> None:
        for i, buffer in enumerate(self._buffers):
            kept = buffer[rows, :, first:last]
            self._buffers[i] = kept.new_zeros(*kept.shape[:2], room, kept.shape[3])
            self._buffers[i][:, :, : last - first] = kept

    def _show(self, columns: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self._buffers)
        return self.keys, self.values


class _Rows(NamedTuple):
    """What the rows of the batch are at. A row that is not busy is computed like the others, and nobody looks."""

    mask_BL: Tensor  # 1 for the columns of the row's own tokens
    sequence_B: Tensor
    busy_B: Tensor
    lengths_B: Tensor  # of the responses so far
    tokens_BT: Tensor

    @classmethod
    def idle(cls, mask_BL: Tensor, max_new_tokens: int) -> "_Rows":
        sequence_B, busy_B, lengths_B = mask_BL.new_zeros(3, len(mask_BL)).unbind()
        return cls(mask_BL, sequence_B, busy_B.bool(), lengths_B, mask_BL.new_zeros(len(mask_BL), max_new_tokens))


class Decoding:
    """One request on its way.

    Args:
        policy: the policy.
        request: what to decode.
        rows: how many at a time, at most.
        progress: called with (sequences done, sequences in all).
    """

    def __init__(
        self, policy: Policy, request: DecodingRequest, rows: int, progress: Callable[[int, int], None]
    ) -> None:
        self.policy, self.request, self.progress = policy, request, progress
        device = policy.device
        self.waiting = deque(sorted(range(len(request.prompts)), key=self._length, reverse=True))
        self.responses: dict[int, Response] = {}
        self.rows = min(rows, len(request.prompts))
        self.ids_N = request.sequence_ids_N.to(device)
        self.eos_E = torch.tensor(policy.eos_token_ids, device=device)
        self.cache = Cache(layer_class_to_replicate=_Layer)
        self.batch = _Rows.idle(torch.zeros(0, 0, dtype=torch.long, device=device), request.max_new_tokens)

    @torch.no_grad()
    def run(self) -> list[Response]:
        """Decode everything.

        Returns:
            The responses, in the order of the prompts.

        Raises:
            NonFiniteError: a logit is NaN or infinite; names the sequence.
        """
        with self.policy.fused_attention():
            if self.waiting:
                self.rows = min(self.rows, self._rows_within_memory())
            while True:
                busy = int(self.batch.busy_B.sum())
                if self.waiting and (not busy or self.rows - busy >= max(1, self.rows // REFILL)):
                    self._admit(busy)
                elif busy:
                    self._drop(busy)
                    self._step()
                else:
                    return [self.responses[i] for i in range(len(self.request.prompts))]

    def _admit(self, busy: int) -> None:
        """Give free rows to the longest waiting prompts."""
        taken = [self.waiting.popleft()]
        # In float64 without padding: several architectures cast the mask to float32, where its most negative number is
        # −inf, and a row of padding becomes NaN.
        shortest = self._length(taken[0]) if self.policy.dtype == torch.float64 else 0
        while self.waiting and len(taken) < self.rows - busy and self._length(self.waiting[0]) >= shortest:
            taken.append(self.waiting.popleft())
        mask_RL, logits_RV, fresh = self._prefill(taken)
        if not busy:
            self.cache, self.batch = fresh, _Rows.idle(mask_RL, self.request.max_new_tokens)
        rows_R = self._free_rows(len(taken))
        width = mask_RL.shape[1]
        if busy:
            for layer, new in zip(self.cache.layers, fresh.layers, strict=True):
                layer.replace(rows_R, new)
            self.batch.mask_BL[rows_R] = 0
            self.batch.mask_BL[rows_R, -width:] = mask_RL
        self.batch.sequence_B[rows_R] = torch.tensor(taken, device=rows_R.device)
        self.batch.busy_B[rows_R] = True
        self.batch.lengths_B[rows_R] = 0
        self._draw(rows_R, logits_RV)

    def _step(self) -> None:
        """One more token in every row."""
        batch = self.batch
        latest_B1 = batch.tokens_BT.gather(1, (batch.lengths_B - 1).clamp_min(0).unsqueeze(1))
        self.batch = batch = batch._replace(mask_BL=nn.functional.pad(batch.mask_BL, (0, 1), value=1))
        logits_BV, _ = self.policy.next_logits(latest_B1, batch.mask_BL, self.cache)
        rows_R = batch.busy_B.nonzero().squeeze(1)
        self._draw(rows_R, logits_BV if len(rows_R) == len(logits_BV) else logits_BV[rows_R])

    def _draw(self, rows_R: Tensor, logits_RV: Tensor) -> None:
        """Draw the next token of some rows, and free those whose response has ended."""
        request, batch = self.request, self.batch
        sequence_R, position_R = batch.sequence_B[rows_R], batch.lengths_B[rows_R]
        ids_R = self.ids_N[sequence_R]
        broken_R = ~torch.isfinite(logits_RV.amax(dim=-1))  # −inf alone is a token that cannot be
        if broken_R.any():
            raise NonFiniteError(
                f"the logits of sequence {int(ids_R[broken_R][0])} are not finite at position "
                f"{int(position_R[broken_R][0])}",
                cause="the weights hold a NaN",
                way_out="check the checkpoint: the run may have diverged before it",
            )
        uniforms_R = philox.uniforms(request.seed, request.purpose, ids_R, position_R)
        tokens_R = philox.inverse_cdf_tokens(logits_RV, uniforms_R, request.temperature)
        batch.tokens_BT[rows_R, position_R] = tokens_R
        batch.lengths_B[rows_R] += 1
        ended: dict[FinishReason, Tensor] = {
            "length": position_R + 1 == request.max_new_tokens,
            "stop": torch.zeros_like(rows_R, dtype=torch.bool),
            "eos": torch.isin(tokens_R, self.eos_E),
        }
        if request.stop_strings:
            ended["stop"] = torch.tensor([self._stopped(row) for row in rows_R.tolist()], device=rows_R.device)
        for reason, ended_R in ended.items():  # of two reasons the later counts
            for row in rows_R[ended_R].tolist():
                tokens = batch.tokens_BT[row, : int(batch.lengths_B[row])].tolist()
                self.responses[int(batch.sequence_B[row])] = Response(tokens, reason)
                batch.busy_B[row] = False
        if any(ended_R.any() for ended_R in ended.values()):
            self.progress(len(self.responses), len(request.prompts))

    def _stopped(self, row: int) -> bool:
        """Whether the text of a row has come to a stop string; only as many tokens are looked at as it has bytes."""
        length, stop_strings = int(self.batch.lengths_B[row]), self.request.stop_strings
        window = max(len(string.encode()) for string in stop_strings) + 1
        end = self.policy.tokenizer.decode(self.batch.tokens_BT[row, max(0, length - window) : length].tolist())
        return any(string in end for string in stop_strings)

    def _drop(self, busy: int) -> None:
        """Columns that no row needs any more, and rows that nobody waits for."""
        batch = self.batch
        first = int(batch.mask_BL[batch.busy_B].argmax(dim=1).min())
        spare_rows = not self.waiting and busy <= SPARSE * len(batch.busy_B)
        if first >= STALE_COLUMNS or spare_rows:
            self._keep(batch.busy_B.nonzero().squeeze(1) if spare_rows else slice(None), first)

    def _keep(self, rows: Tensor | slice, first: int) -> None:
        for layer in self.cache.layers:
            layer.keep(rows, first)
        self.batch = _Rows(*(column[rows] for column in self.batch))
        self.batch = self.batch._replace(mask_BL=self.batch.mask_BL[:, first:])

    def _free_rows(self, count: int) -> Tensor:
        """Rows that are not busy; where there are too few, the batch gets more."""
        missing = count - int((~self.batch.busy_B).sum())
        if missing > 0:
            there = len(self.batch.busy_B)
            self._keep(
                torch.cat([torch.arange(there), torch.zeros(missing, dtype=torch.long)]).to(self.policy.device), 0
            )
            self.batch.busy_B[there:] = False
        return (~self.batch.busy_B).nonzero().squeeze(1)[:count]

    def _length(self, sequence: int) -> int:
        return len(self.request.prompts[sequence])

    def _prefill(self, sequences: list[int]) -> tuple[Tensor, Tensor, Cache]:
        """Mask, next logits and cache of some prompts, padded on the left."""
        prompts = [list(self.request.prompts[i]) for i in sequences]
        longest = max(map(len, prompts))
        device, cache = self.policy.device, Cache(layer_class_to_replicate=_Layer)
        ids_RL = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask_RL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        return mask_RL, self.policy.next_logits(ids_RL, mask_RL, cache)[0], cache

    def _rows_within_memory(self) -> int:
        """How many rows the cache may have, from what one prompt takes."""
        mask_1L, _, cache = self._prefill([self.waiting[0]])
        taken = sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))
        columns = mask_1L.shape[1] + self.request.max_new_tokens + ROOM + STALE_COLUMNS
        return max(1, int(CACHE_SHARE * _free_bytes(self.policy.device) / (columns * taken / mask_1L.shape[1])))


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available

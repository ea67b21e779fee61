"""Continuous batching: decode many responses in the rows of one batch, and refill a row when its response ends.

The key-value cache is right-aligned: every row ends in the newest column, and columns before its prompt are masked. A
row can therefore be given to another prompt at any time, no row waits for the longest response, and an architecture
only has to support left padding. Waiting prompts are sorted by length, longest first, so that a new prompt always fits
into the existing columns.

Columns that no row needs any more are dropped, and so are idle rows once no prompt is waiting. The draws of a sequence
depend only on (seed, purpose, sequence id, position), so batching does not change them.

All bookkeeping is on the host. A step reads only the drawn tokens from the device (and their log-probabilities, if the
law that draws them is not the policy), because every other read would stall a GPU.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from entropy_core.errors import NonFiniteError
from entropy_core.numerics import philox
from entropy_core.numerics.philox import Purpose
from entropy_core.numerics.proposal import Proposal
from entropy_core.policy.model import Policy
from entropy_core.sequences.batch import FinishReason
from entropy_core.sequences.cache import ROOM, new_cache
from entropy_core.sequences.stopping import StoppingRule

STALE_COLUMNS = 16  # unneeded columns are dropped once there are this many
REFILL = 16  # rows are refilled once one in this many is free, because every prefill reads all weights
SPARSE = 0.75  # idle rows are dropped once at most this fraction of the rows is busy
CACHE_SHARE = 0.5  # fraction of the memory free before the first prompt that the cache may use
DRAWN_AHEAD = 32  # positions whose uniforms are drawn together

Progress = Callable[[int, int], None]
"""Called with (finished sequences, total sequences)."""

IDLE = -1
NOT_FINITE = -1


@dataclass(frozen=True)
class DecodingRequest:
    """Prompts to decode with their sequence ids, the seed and purpose of their draws, and the stopping rules."""

    prompts: Sequence[Sequence[int]]
    sequence_ids_N: Tensor
    seed: int
    purpose: Purpose
    temperature: float
    max_new_tokens: int
    stop_strings: Sequence[str] = ()
    proposal: Proposal | None = None

    def temperatures(self) -> Tensor:
        """Return the temperature that each response is drawn at, float64 [N]."""
        temperature_N = torch.full((len(self.prompts),), self.temperature, dtype=torch.float64)
        if self.proposal is None:
            return temperature_N
        uniforms_N = philox.uniforms(self.seed, Purpose.E_COMPONENT, self.sequence_ids_N)
        return temperature_N.where(uniforms_N >= self.proposal.share, self.proposal.temperature)

    def stopping_rule(self, policy: Policy) -> StoppingRule:
        """Return when a response of this policy ends."""
        eos = frozenset(policy.eos_token_ids)
        return StoppingRule(eos, self.stop_strings, self.max_new_tokens, lambda ids: policy.tokenizer.decode(ids))


class Response(NamedTuple):
    """Token ids of a response and why it ended; a sampled EOS is included as the last token.

    With a proposal, each token has its log-probabilities at the policy's and at the proposal's temperature.
    """

    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[list[float]]


@dataclass
class _Rows:
    """State of the rows of the batch. Idle rows are computed like the others, and their results are ignored.

    On the device: the mask [rows, columns], 1 for a row's own tokens, and the latest token of each row. On the host:
    the sequence of each row or `IDLE`, the column of its first token, and its response so far with log-probabilities.
    """

    mask_BL: Tensor
    latest_B1: Tensor
    sequences: list[int]
    first_columns: list[int]
    tokens: list[list[int]]
    logprobs: list[list[list[float]]]

    @classmethod
    def idle(cls, mask_BL: Tensor) -> "_Rows":
        count = len(mask_BL)
        empty: tuple[list[list[int]], list[list[list[float]]]] = [[] for _ in range(count)], [[] for _ in range(count)]
        return cls(mask_BL, mask_BL.new_zeros(count, 1), [IDLE] * count, [0] * count, *empty)

    @property
    def busy(self) -> list[int]:
        return [row for row, sequence in enumerate(self.sequences) if sequence != IDLE]

    @property
    def free(self) -> list[int]:
        return [row for row, sequence in enumerate(self.sequences) if sequence == IDLE]


class Decoding:
    """Decodes one request.

    Args:
        policy: the policy.
        request: prompts and sampling settings.
        rows: maximum number of rows in the batch.
        progress: called with (finished sequences, total sequences).
    """

    def __init__(self, policy: Policy, request: DecodingRequest, rows: int, progress: Progress) -> None:
        self.policy, self.request, self.progress = policy, request, progress
        self.waiting = deque(sorted(range(len(request.prompts)), key=self._length, reverse=True))
        self.responses: dict[int, Response] = {}
        self.temperature_N = request.temperatures()
        self.rows = min(rows, len(request.prompts))
        self.rule = request.stopping_rule(policy)
        self.cache = new_cache(policy.model)
        self.batch = _Rows.idle(torch.zeros(0, 0, dtype=torch.long, device=policy.device))
        self.uniforms: deque[Tensor] = deque()  # uniforms [rows] of the next positions

    @torch.no_grad()
    def run(self) -> list[Response]:
        """Decode all prompts.

        Returns:
            The responses, in the order of the prompts.

        Raises:
            NonFiniteError: a logit is NaN or infinite; names the sequence.
        """
        if self.waiting:
            self.rows = min(self.rows, self._rows_within_memory())
        while True:
            busy = len(self.batch.busy)
            if self.waiting and (not busy or self.rows - busy >= max(1, self.rows // REFILL)):
                self._admit(busy)
            elif busy:
                self._drop()
                self._step()
            else:
                return [self.responses[i] for i in range(len(self.request.prompts))]

    def _admit(self, busy: int) -> None:
        """Give free rows to the longest waiting prompts."""
        taken = [self.waiting.popleft()]
        # In float64, only prompts of equal length are batched: several architectures cast the mask to float32, where
        # its most negative number becomes −inf and a row of padding becomes NaN.
        shortest = self._length(taken[0]) if self.policy.dtype == torch.float64 else 0
        while self.waiting and len(taken) < self.rows - busy and self._length(self.waiting[0]) >= shortest:
            taken.append(self.waiting.popleft())
        mask_RL, logits_RV, fresh = self._prefill(taken)
        if not busy:
            self.cache, self.batch = fresh, _Rows.idle(mask_RL)
        rows = self._free_rows(len(taken))
        batch, rows_R = self.batch, self._on_device(rows)
        if busy:
            for layer, new in zip(self.cache.layers, fresh.layers, strict=True):
                layer.replace(rows_R, new)
            batch.mask_BL[rows_R] = nn.functional.pad(mask_RL, (batch.mask_BL.shape[1] - mask_RL.shape[1], 0))
        for row, sequence in zip(rows, taken, strict=True):
            batch.sequences[row], batch.tokens[row], batch.logprobs[row] = sequence, [], []
            batch.first_columns[row] = batch.mask_BL.shape[1] - self._length(sequence)
        ids_R = self.request.sequence_ids_N[torch.tensor(taken)]
        uniforms_R = philox.uniforms(self.request.seed, self.request.purpose, ids_R)
        batch.latest_B1[rows_R] = self._draw(rows, logits_RV, uniforms_R.to(self.policy.device)).unsqueeze(1)
        self.uniforms.clear()

    def _step(self) -> None:
        """Decode one token in every row."""
        batch = self.batch
        batch.mask_BL = nn.functional.pad(batch.mask_BL, (0, 1), value=1)
        logits_BV, _ = self.policy.next_logits(batch.latest_B1, batch.mask_BL, self.cache)
        batch.latest_B1 = self._draw(range(len(batch.sequences)), logits_BV, self._next_uniforms()).unsqueeze(1)

    def _next_uniforms(self) -> Tensor:
        """Return the uniform for the next position of every row, float64 [rows]; arbitrary for idle rows."""
        if not self.uniforms:
            batch, request = self.batch, self.request
            ids_B = request.sequence_ids_N[torch.tensor(batch.sequences).clamp_min(0)]
            first_B1 = torch.tensor([[len(tokens)] for tokens in batch.tokens])
            position_BC = first_B1 + torch.arange(DRAWN_AHEAD)
            uniforms_BC = philox.uniforms(request.seed, request.purpose, ids_B.unsqueeze(1), position_BC)
            self.uniforms.extend(uniforms_BC.to(self.policy.device).unbind(1))
        return self.uniforms.popleft()

    def _draw(self, rows: Sequence[int], logits_RV: Tensor, uniforms_R: Tensor) -> Tensor:
        """Draw the next token of R rows, record the tokens of busy rows, and free the rows whose responses ended."""
        request, batch = self.request, self.batch
        tokens_R = philox.inverse_cdf_tokens(logits_RV, uniforms_R, self._temperature(rows, logits_RV.device))
        finite_R = torch.isfinite(logits_RV.amax(dim=-1))  # single −inf logits are allowed: impossible tokens
        done = len(self.responses)
        recorded = self._logprobs(logits_RV, tokens_R)
        for i, (row, token) in enumerate(zip(rows, torch.where(finite_R, tokens_R, NOT_FINITE).tolist(), strict=True)):
            sequence, tokens = batch.sequences[row], batch.tokens[row]
            if sequence == IDLE:
                continue
            if token == NOT_FINITE:
                raise NonFiniteError(
                    f"the logits of sequence {int(request.sequence_ids_N[sequence])} are not finite at position "
                    f"{len(tokens)}",
                    cause="the weights contain a NaN",
                    fix="check the checkpoint; if the run diverged, probe an earlier one",
                )
            tokens.append(token)
            batch.logprobs[row] += recorded[i : i + 1]
            if reason := self.rule.reason(tokens, len(tokens)):
                self.responses[sequence] = Response(tokens, reason, batch.logprobs[row])
                batch.sequences[row] = IDLE
        if len(self.responses) > done:
            self.progress(len(self.responses), len(request.prompts))
        return tokens_R.where(finite_R, 0)

    def _temperature(self, rows: Sequence[int], device: torch.device) -> float | Tensor:
        """Return the temperature that rows are drawn at: one for all, or one for each with a proposal, float64 [R]."""
        if self.request.proposal is None:
            return self.request.temperature
        return self.temperature_N[torch.tensor([self.batch.sequences[row] for row in rows]).clamp_min(0)].to(device)

    def _logprobs(self, logits_RV: Tensor, tokens_R: Tensor) -> list[list[float]]:
        """Return the log-probabilities of tokens under both components of the proposal; empty without one."""
        if self.request.proposal is None:
            return []
        temperatures = self.request.temperature, self.request.proposal.temperature
        columns = [philox.token_logprobs(logits_RV, tokens_R, temperature) for temperature in temperatures]
        return torch.stack(columns, dim=1).tolist()

    def _drop(self) -> None:
        """Drop columns that no row needs any more, and idle rows if no prompt is waiting."""
        batch, busy = self.batch, self.batch.busy
        first = min(batch.first_columns[row] for row in busy)
        spare_rows = not self.waiting and len(busy) <= SPARSE * len(batch.sequences)
        if first >= STALE_COLUMNS or spare_rows:
            self._keep(busy if spare_rows else list(range(len(batch.sequences))), first)

    def _keep(self, rows: list[int], first: int) -> None:
        batch = self.batch
        if rows == list(range(len(batch.sequences))):
            chosen: Tensor | slice = slice(None)
        else:
            chosen = self._on_device(rows)
            self.uniforms.clear()
        for layer in self.cache.layers:
            layer.keep(chosen, first)
        self.batch = _Rows(
            batch.mask_BL[chosen, first:],
            batch.latest_B1[chosen],
            [batch.sequences[row] for row in rows],
            [batch.first_columns[row] - first for row in rows],
            [batch.tokens[row] for row in rows],
            [batch.logprobs[row] for row in rows],
        )

    def _free_rows(self, count: int) -> list[int]:
        """Return idle rows, and add rows to the batch if there are too few."""
        existing = len(self.batch.sequences)
        missing = count - len(self.batch.free)
        if missing > 0:
            self._keep([*range(existing), *[0] * missing], 0)
            self.batch.sequences[existing:] = [IDLE] * missing
        return self.batch.free[:count]

    def _length(self, sequence: int) -> int:
        return len(self.request.prompts[sequence])

    def _on_device(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, device=self.policy.device)

    def _prefill(self, sequences: list[int]) -> tuple[Tensor, Tensor, Cache]:
        """Run the left-padded prompts through the model; return their mask, next logits, and cache."""
        prompts = [list(self.request.prompts[i]) for i in sequences]
        longest = max(map(len, prompts))
        device, cache = self.policy.device, new_cache(self.policy.model)
        ids_RL = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask_RL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        return mask_RL, self.policy.next_logits(ids_RL, mask_RL, cache)[0], cache

    def _rows_within_memory(self) -> int:
        """Return how many rows of cache fit into memory, extrapolated from one prompt."""
        mask_1L, _, cache = self._prefill([self.waiting[0]])
        columns = mask_1L.shape[1] + self.request.max_new_tokens + ROOM + STALE_COLUMNS
        sizes: Counter[torch.device] = Counter()
        for layer in cache.layers:
            sizes[getattr(layer, "device", None) or self.policy.device] += layer.size(columns)
        return max(1, min(int(CACHE_SHARE * _free_bytes(device) / size) for device, size in sizes.items() if size))


def _free_bytes(device: torch.device) -> int:
    """Return the available memory; on a GPU this includes memory that torch has reserved but does not use."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


Decode = Callable[[Policy, DecodingRequest, int, Progress], list[Response]]
"""Decodes a request with a policy, in at most so many rows: `decode`, or another sampler."""


def decode(policy: Policy, request: DecodingRequest, rows: int, progress: Progress) -> list[Response]:
    """Decode all prompts of a request here; see `Decoding`."""
    return Decoding(policy, request, rows, progress).run()

"""Tokens per second of the sampler beside `model.generate`, and what the batch size does to the tokens."""

import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks.common import Row, seconds
from benchmarks.model_shape import EOS, make_policy, make_processor
from benchmarks.reasons import by_profile
from entropy_core.numerics import philox
from entropy_core.numerics.philox import Purpose
from entropy_core.policy.model import Policy
from entropy_core.sequences.batch import BatchedSequences

BATCH, PROMPT, SHORTEST, LONGEST = 64, 32, 8, 128
HAZARD = 1 / 60  # of the EOS, from the shortest length on: mean length about 59, a seventh are cut
EQUAL = 64


class _Ends(LogitsProcessor):
    """Gives the EOS a probability of its own, so that random and real weights have responses of one law of lengths."""

    def __init__(self, hazard: float) -> None:
        self.hazard = hazard

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.with_ends(scores, torch.full((len(scores),), input_ids.shape[1] - PROMPT))

    def with_ends(self, scores_BV: Tensor, done_B: Tensor) -> Tensor:
        """The logits of the next token, after `done_B` tokens."""
        scores_BV = scores_BV.clone()
        scores_BV[:, EOS] = -torch.inf
        if self.hazard:
            odds = scores_BV.logsumexp(-1) + math.log(self.hazard / (1 - self.hazard))
            scores_BV[:, EOS] = torch.where(done_B.to(odds.device) >= SHORTEST - 1, odds, -torch.inf)
        return scores_BV


def sampling() -> Iterator[Row]:
    """Mixed and equal lengths."""
    policy = make_policy()
    prompts = torch.randint(3, 40000, (512, PROMPT), generator=torch.Generator().manual_seed(2))
    for name, count, hazard, longest, mark in (
        (f"sampling, lengths {SHORTEST} to {LONGEST}", 512, HAZARD, LONGEST, "≥ 1.5"),
        (f"sampling, all of {EQUAL} tokens", 2 * BATCH, 0.0, EQUAL, "≥ 1"),
    ):
        ends = _Ends(hazard)
        mine = _rate(_ours, policy, prompts[:count], longest, ends)
        theirs = _rate(_generate, policy, prompts[:count], longest, ends)
        against = f"{theirs:.0f} tokens/s, model.generate"
        what = f"{name}, {count} sequences, batch {BATCH}"
        few = policy, prompts[:BATCH], min(32, longest), ends
        yield Row(what, f"{mine:.0f} tokens/s", against, mine / theirs, mark).because(
            lambda few=few: by_profile(
                lambda: _ours(*few), lambda: _generate(*few), f"{BATCH} sequences of up to {few[2]} tokens"
            )
        )
    yield from _match(policy, prompts)


def _rate(run: Callable[..., int], *arguments: Any) -> float:
    """Tokens per second."""
    tokens: list[int] = []
    taken = seconds(lambda: tokens.append(run(*arguments)))
    return tokens[0] / taken


def _ours(policy: Policy, prompts: Tensor, longest: int, ends: _Ends) -> int:
    with _ending(policy, ends):
        return len(_sampled(policy, prompts, longest, BATCH).response_tokens_K)


def _sampled(policy: Policy, prompts: Tensor, longest: int, batch: int) -> BatchedSequences:
    processor = make_processor(policy, max_new_tokens=longest, gen_batch_size=batch)
    return processor.generate_distinct(prompts.tolist(), len(prompts), 1, 3, "E")


def _generate(policy: Policy, prompts: Tensor, longest: int, ends: _Ends) -> int:
    """With the attention that transformers takes by itself."""
    tokens = 0
    with torch.no_grad():
        for ids_BL in prompts.to(policy.device).split(BATCH):
            out_BL = policy.model.generate(
                ids_BL,
                attention_mask=torch.ones_like(ids_BL),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=longest,
                eos_token_id=EOS,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([ends]),
            )
            response_BT = out_BL[:, PROMPT:]
            ended_BT = (response_BT == EOS).cumsum(1)
            tokens += int(((ended_BT == 0) | ((response_BT == EOS) & (ended_BT == 1))).sum())
    return tokens


def _match(policy: Policy, prompts: Tensor) -> Iterator[Row]:
    """The same 32 sequences in batches of 1, 8 and 32."""
    count, longest, found, drawn = 32, 32, {}, {}
    for batch in (1, 8, 32):
        drawn[batch] = {}
        with _recorded(drawn[batch]):
            found[batch] = _sampled(policy, prompts[:count], longest, batch)
    for batch in (1, 8):
        same = total = 0
        for i in range(count):
            ours, theirs = found[batch].response(i).tolist(), found[32].response(i).tolist()
            agreed = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
            same, total = same + agreed, total + len(theirs)
        common = drawn[batch].keys() & drawn[32].keys()
        equal = all(drawn[batch][key] == drawn[32][key] for key in common)
        against = f"{'identical' if equal else 'different'} draws at {len(common):,} shared (sequence, position) pairs"
        what = f"tokens equal until the first that differs, batch {batch} against 32"
        yield Row(what, f"{same} of {total}", against, same / total)


def _ending(policy: Policy, ends: _Ends) -> Any:
    """Within the context the policy's own logits end responses by the same law."""
    plain = policy.next_logits

    def with_ends(input_ids_BL: Tensor, mask_BL: Tensor, cache: Any) -> tuple[Tensor, Any]:
        logits_BV, cache = plain(input_ids_BL, mask_BL, cache)
        return ends.with_ends(logits_BV, mask_BL.sum(1) - PROMPT), cache

    return mock.patch.object(policy, "next_logits", with_ends)


def _recorded(seen: dict[tuple[int, int], float]) -> Any:
    """Within the context the uniform of every (sequence, position) that is drawn is noted."""
    plain = philox.uniforms

    def recording(seed: int, purpose: Purpose, sequence: Tensor, position: Tensor | int = 0) -> Tensor:
        values = plain(seed, purpose, sequence, position)
        if purpose in (Purpose.E_TOKEN, Purpose.U_TOKEN):
            of, at = (x.flatten().tolist() for x in torch.broadcast_tensors(sequence, torch.as_tensor(position)))
            seen.update(zip(zip(of, at, strict=True), values.flatten().tolist(), strict=True))
        return values

    return mock.patch.object(philox, "uniforms", recording)

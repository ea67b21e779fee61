"""The passes over given sequences: scoring, derivatives, step sizes; each against the bare forward pass."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, jvp

from benchmarks.common import Row, Run, median_ratio, peak_megabytes, take_turns
from benchmarks.model_shape import make_policy, make_processor, make_sequences
from benchmarks.reasons import by_profile
from entropy_core.policy import moves
from entropy_core.policy.attention import attention_set
from entropy_core.policy.model import Policy
from entropy_core.sequences.batch import BatchedSequences
from entropy_core.sequences.derivatives import central_difference, forward_mode
from entropy_core.sequences.processor import SequenceProcessor

LENGTH, MICRO_BATCH = 128, 16
TOKENS = 8192
ROUNDS = 3
DTYPES = ("float32", "bfloat16") if torch.cuda.is_available() else ("float32",)
EAGER = "bare forward with eager attention"
ONE_MICRO_BATCH = f"one micro-batch, {MICRO_BATCH * LENGTH:,} tokens"


def scoring() -> Iterator[Row]:
    """ℓ and h of 8,192 tokens; on a GPU in bfloat16 as well."""
    yield from in_each_dtype(_scoring)


def scoring_memory() -> Iterator[Row]:
    """What scoring needs at the peak, and that it does not grow with the tokens; on a GPU in bfloat16 as well."""
    yield from in_each_dtype(_scoring_memory)


def derivatives() -> Iterator[Row]:
    """ℓ̇ and ḣ of every token along a direction: our two ways on 8,192 tokens; beside the others on one micro-batch."""
    yield from in_each_dtype(_derivatives)


def step_sizes() -> Iterator[Row]:
    """E at θ and at five moved policies."""
    yield from in_each_dtype(_step_sizes)


def in_each_dtype(group: Callable[[str], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a group in float32; on a GPU in bfloat16 too, without marks: the probe never computes in it."""
    for dtype in DTYPES:
        for row in group(dtype):
            yield row if dtype == "float32" else replace(row, name=f"{row.name}, {dtype}", mark="")


def _scoring(dtype: str) -> Iterator[Row]:
    policy = make_policy(dtype)
    processor, batch = make_processor(policy, MICRO_BATCH), make_sequences([LENGTH] * (TOKENS // LENGTH))
    ways: dict[str, tuple[Run, int, str]] = {
        "bare forward that returns logits, same micro-batches": (lambda: bare_forward(processor, batch), 5, "≤ 1.15"),
        "the same forward with eager attention": (lambda: _eager(processor, batch), 1, ""),
        "full logits, log_softmax, entropy, same micro-batches": (lambda: full_logits(processor, batch), 1, ""),
    }
    few = batch.select(torch.arange(MICRO_BATCH))
    for what, (other, rounds, mark) in ways.items():
        ours, theirs = take_turns({"ours": lambda: processor.score(batch), what: other}, rounds).values()
        said = f"{statistics.median(theirs):.2f} s, {what}, median of {rounds}"
        name = f"log-probabilities and entropies, {TOKENS:,} tokens"
        row = Row(name, f"{statistics.median(ours):.2f} s", said, median_ratio(ours, theirs), mark)
        yield row.because(
            lambda: by_profile(lambda: processor.score(few), lambda: bare_forward(processor, few), ONE_MICRO_BATCH)
        )


def _scoring_memory(dtype: str) -> Iterator[Row]:
    memory = {
        (what, tokens): peak_megabytes(_memory_of_scoring, what, tokens, dtype)
        for what in ("score", "full")
        for tokens in (TOKENS, 2 * TOKENS)
    }
    for tokens in (TOKENS, 2 * TOKENS):
        ours, full = memory["score", tokens], memory["full", tokens]
        against = f"{full:,.0f} MiB, full logits of all tokens at once"
        yield Row(f"peak memory of it, {tokens:,} tokens", f"{ours:,.0f} MiB", against, ours / full, "≤ 0.05")
    ours, half = memory["score", 2 * TOKENS], memory["score", TOKENS]
    yield Row("peak memory, twice the tokens", f"{ours:,.0f} MiB", f"{half:,.0f} MiB", ours / half, "≤ 1.05")


def _derivatives(dtype: str) -> Iterator[Row]:
    policy = make_policy(dtype)
    v = random_direction(policy)
    marks = {"forward mode": "≤ 3.2", "fast path": "≤ 2.2"}
    for tokens in (TOKENS, MICRO_BATCH * LENGTH):
        processor, batch = make_processor(policy, MICRO_BATCH), make_sequences([LENGTH] * (tokens // LENGTH))
        ways = ways_of_derivatives(processor, batch, v)
        marked = tokens == TOKENS
        chosen = (
            ["bare forward", *marks, EAGER] if marked else [name for name in ways if name not in ("fast path", EAGER)]
        )
        taken = take_turns({name: ways[name] for name in chosen}, ROUNDS)
        pairs = [(name, "bare forward") for name in chosen[1:] if name != EAGER]
        for name, other in [*pairs, ("forward mode", EAGER)] if marked else pairs:
            gives = "ℓ̇ and ḣ" if "forward mode" in name or name in marks else "sums in place of ℓ̇ and ḣ"
            ours, theirs = taken[name], taken[other]
            row = Row(
                f"{gives}, {name}, {tokens:,} tokens",
                f"{statistics.median(ours):.2f} s",
                f"{statistics.median(theirs):.2f} s, {other}",
                median_ratio(ours, theirs),
                marks.get(name, "") if marked and other != EAGER else "",
            )
            few = ways_of_derivatives(processor, batch.select(torch.arange(MICRO_BATCH)), v)
            yield row.because(partial(by_profile, few[name], few[other], ONE_MICRO_BATCH))
    ours = peak_megabytes(_memory_of_derivatives, "forward mode", dtype)
    for other in ("full-logit forward mode", "batched forward and backward"):
        there = peak_megabytes(_memory_of_derivatives, other, dtype)
        mark = "≤ 0.2" if "backward" in other else ""
        against = f"{there:,.0f} MiB, {other}, full logits" if mark else f"{there:,.0f} MiB, {other}"
        yield Row("peak memory of forward mode", f"{ours:,.0f} MiB", against, ours / there, mark)


def _step_sizes(dtype: str) -> Iterator[Row]:
    policy = make_policy(dtype)
    batch = make_sequences([LENGTH] * (TOKENS // LENGTH))
    processor, v = make_processor(policy, MICRO_BATCH), random_direction(policy)

    def sweep(batch: BatchedSequences = batch) -> None:
        processor.score(batch)
        for eta in (0.25, 0.5, 1.0, 1.5, 2.0):
            with moves.moved(policy, v, 1e-3 * eta):
                processor.score(batch)

    def six(batch: BatchedSequences = batch) -> None:
        for _ in range(6):
            processor.score(batch)

    taken = take_turns({"sweep": sweep, "six": six}, ROUNDS - 1)
    ours, six_passes = (statistics.median(taken[name]) for name in ("sweep", "six"))
    name = f"η sweep of 5 points over {batch.response_offsets_N1[-1]:,} tokens"
    against = f"{six_passes:.1f} s, 6 passes at θ"
    row = Row(name, f"{ours:.1f} s", against, median_ratio(taken["sweep"], taken["six"]), "≤ 1.05")
    few = batch.select(torch.arange(MICRO_BATCH))
    yield row.because(lambda: by_profile(lambda: sweep(few), lambda: six(few), ONE_MICRO_BATCH))


def padding() -> Iterator[Row]:
    """Tokens that are computed for nothing, with responses of 8 to 128 tokens in shards of 1,024."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, LENGTH + 1, (1024,), generator=generator).tolist()
    batch = make_sequences(lengths, prompt_length=16)
    policy = make_policy()
    shapes = [rows.input_ids_BL.numel() for _, rows in make_processor(policy, MICRO_BATCH).micro_batches(batch)]
    real = len(batch.prompt_tokens) + len(batch.response_tokens_K)
    in_order = sum(MICRO_BATCH * (16 + max(lengths[i : i + MICRO_BATCH])) for i in range(0, len(lengths), MICRO_BATCH))
    ours, theirs = 1 - real / sum(shapes), 1 - real / in_order
    yield Row("padding, share of the tokens", f"{ours:.1%}", f"{theirs:.1%}, in the order drawn", ours, "≤ 0.05")


def ways_of_derivatives(processor: SequenceProcessor, batch: BatchedSequences, v: dict[str, Tensor]) -> dict[str, Run]:
    """The bare forward pass, and every way there is to what a sequence does to ∂_vH."""
    return {
        "bare forward": lambda: bare_forward(processor, batch),
        EAGER: lambda: _eager(processor, batch),
        "forward mode": lambda: forward_mode(processor, batch, v),
        "fast path": lambda: central_difference(processor, batch, v, 1e-3),
        "full-logit forward mode": lambda: full_logit_forward_mode(processor, batch, v),
        "batched forward and backward": lambda: forward_backward(processor, batch),
        "a backward per sequence": lambda: backward_per_sequence(processor, batch, v),
    }


def bare_forward(processor: SequenceProcessor, batch: BatchedSequences) -> None:
    """The model's own forward pass over the same micro-batches."""
    with torch.no_grad():
        for _, rows in processor.micro_batches(batch):
            _ = processor.policy.model(input_ids=rows.input_ids_BL, use_cache=False).logits


def full_logits(processor: SequenceProcessor, batch: BatchedSequences) -> None:
    """ℓ and h the way that they are written first."""
    with torch.no_grad():
        for _, rows in processor.micro_batches(batch):
            logp_BLV = processor.policy.model(input_ids=rows.input_ids_BL, use_cache=False).logits.log_softmax(-1)
            _ = (
                -(logp_BLV.exp() * logp_BLV).sum(-1),
                logp_BLV[rows.row_K, rows.position_K].gather(-1, rows.tokens_K[:, None]),
            )


def full_logit_forward_mode(processor: SequenceProcessor, batch: BatchedSequences, v: dict[str, Tensor]) -> None:
    """Forward mode through all logits and the plain formulas."""
    model = processor.policy.model
    for _, rows in processor.micro_batches(batch):

        def plain(parameters: dict[str, Tensor], rows=rows) -> tuple[Tensor, Tensor]:
            logits_BLV = functional_call(model, parameters, (rows.input_ids_BL,), {"use_cache": False}).logits
            logp_KV = logits_BLV[rows.row_K, rows.position_K].log_softmax(-1)
            return logp_KV.gather(1, rows.tokens_K[:, None])[:, 0], -(logp_KV.exp() * logp_KV).sum(-1)

        with torch.no_grad(), attention_set(model, "eager"):  # torch's fused one has no derivative
            jvp(plain, ({name: p.detach() for name, p in processor.policy.named_parameters().items()},), (v,))


def forward_backward(processor: SequenceProcessor, batch: BatchedSequences) -> None:
    """One gradient of the whole batch through full logits: a sum, where the probe wants every token."""
    parameters = list(processor.policy.named_parameters().values())
    for _, rows in processor.micro_batches(batch):
        logits_BLV = processor.policy.model(input_ids=rows.input_ids_BL, use_cache=False).logits
        logp_KV = logits_BLV[rows.row_K, rows.position_K].log_softmax(-1)
        torch.autograd.grad(-(logp_KV.exp() * logp_KV).sum(), parameters)


def backward_per_sequence(processor: SequenceProcessor, batch: BatchedSequences, v: dict[str, Tensor]) -> None:
    """⟨gradient, v⟩ of each sequence, by a backward pass each: sums over a sequence, where the probe wants tokens."""
    policy = processor.policy
    for i in range(len(batch)):
        for _, rows in processor.micro_batches(batch.select(torch.tensor([i]))):
            parameters = policy.named_parameters()
            logprobs_K, entropies_K = policy.scorer(rows, 1.0)
            found = torch.autograd.grad((logprobs_K + entropies_K).sum(), list(parameters.values()))
            sum(float((g * v[name]).sum()) for name, g in zip(parameters, found, strict=True))


def random_direction(policy: Policy) -> dict[str, Tensor]:
    """A direction of about unit effect."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator).to(p) / p.numel() ** 0.5
        for name, p in policy.named_parameters().items()
    }


def _eager(processor: SequenceProcessor, batch: BatchedSequences) -> None:
    with attention_set(processor.policy.model, "eager"):
        bare_forward(processor, batch)


def _memory_of_scoring(what: str, tokens: int, dtype: str) -> Run:
    policy = make_policy(dtype)
    batch = make_sequences([LENGTH] * (tokens // LENGTH))
    if what == "full":
        return lambda: full_logits(make_processor(policy, len(batch)), batch)
    return lambda: make_processor(policy, MICRO_BATCH).score(batch)


def _memory_of_derivatives(what: str, dtype: str) -> Run:
    policy = make_policy(dtype)
    processor, batch = make_processor(policy, MICRO_BATCH), make_sequences([LENGTH] * MICRO_BATCH)
    return ways_of_derivatives(processor, batch, random_direction(policy))[what]

"""Make an update batch of recorded rollouts: groups of equal size, prompts of the pool, token ids of the policy."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_core.errors import ConfigError, PromptError, is_failure, one_line, some_names
from entropy_core.numerics import ragged
from entropy_core.prompts.conversations import canonical
from entropy_core.prompts.rollout_files import Row
from entropy_core.sequences.batch import BatchedSequences, FinishReason

OF_TOKENS = ("old_logprobs", "sampling_logprobs", "ref_logprobs")
"""Columns with a number for each token of a response."""


class Pool(NamedTuple):
    """The prompts that the batch may have.

    Args:
        prompts: texts or conversations.
        token_ids: of each.
    """

    prompts: Sequence[Any]
    token_ids: Sequence[Sequence[int]]


class Ends(NamedTuple):
    """How responses end.

    Args:
        eos: ids of the tokens that end a response.
        max_new_tokens: where a response is cut.
        vocabulary: number of tokens of the policy.
    """

    eos: Sequence[int]
    max_new_tokens: int
    vocabulary: int


class RecordedBatch(NamedTuple):
    """An update batch as a trainer recorded it; responses to one prompt are adjacent.

    Args:
        sequences: prompts and responses.
        rewards_N: of each response, None where it has none; None if the file has no rewards.
        advantages_N: float64 [N]; None if the file has none.
        of_tokens: float64 [K] by the names of `OF_TOKENS`, as far as the file has them.
        retokenised: whether token ids were made of texts.
    """

    sequences: BatchedSequences
    rewards_N: list[float | None] | None
    advantages_N: Tensor | None
    of_tokens: Mapping[str, Tensor]
    retokenised: bool


def in_groups(rows: Sequence[Row], source: str) -> list[list[Row]]:
    """Put the responses to one prompt together, in the order in which the prompts come first.

    Args:
        rows: from `read_rollouts`; a `group` tells apart two groups with the same prompt.
        source: file name, for messages.

    Returns:
        The groups, all of one size.

    Raises:
        ConfigError: the groups have different sizes, or there is one response to each prompt, or one prompt.
    """
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        prompt = tuple(row["prompt_ids"]) if "prompt_ids" in row else canonical(row["prompt"])
        groups.setdefault((row.get("group"), prompt), []).append(row)
    sizes = sorted({len(group) for group in groups.values()})
    if len(sizes) > 1:
        raise ConfigError(
            f"the groups of {source} are of different sizes: {some_names(map(str, sizes))} responses to a prompt",
            cause="the file of one of several processes, a batch that was filtered, or a prompt that was drawn twice",
            fix="give all responses to every prompt; write a column `group` where a prompt was drawn twice",
        )
    if sizes == [1] or len(groups) == 1:
        what = "one response to each prompt" if sizes == [1] else "responses to one prompt"
        raise ConfigError(
            f"{source} has {what}: advantages and their spread need two prompts with two responses each",
            fix="give the rollouts of a whole step",
        )
    return list(groups.values())


def as_batch(groups: Sequence[Sequence[Row]], pool: Pool, tokenizer: Any, ends: Ends, source: str) -> RecordedBatch:
    """Make an update batch of groups of rollouts.

    Args:
        groups: from `in_groups`.
        pool: the prompts of the configuration.
        tokenizer: of the checkpoint; makes token ids where the file has texts alone.
        ends: how responses end.
        source: file name, for messages.

    Returns:
        The batch. A text that becomes fewer than `max_new_tokens` tokens is taken to have ended with EOS, which
        trainers leave out when they record texts.

    Raises:
        ConfigError: a prompt is none of the pool's, or a response is longer than `max_new_tokens`.
        PromptError: a token id is none of the policy's vocabulary, or a text cannot be encoded.
    """
    rows = [row for group in groups for row in group]
    responses = _responses(rows, tokenizer, ends, source)
    prompts_P = _in_pool([group[0] for group in groups], pool, tokenizer, source)
    each, group = len(groups[0]), torch.arange(len(rows)) // len(groups[0])
    prompt_ids_N = torch.tensor(prompts_P)[group]
    prompts = [pool.token_ids[i] for i in prompt_ids_N.tolist()]
    for what, ids in (("prompts", prompts), ("responses", responses)):
        if (largest := max(map(max, ids))) >= ends.vocabulary:
            raise PromptError(
                f"the {what} of {source} have token id {largest}, and the policy has only {ends.vocabulary} tokens",
                cause="rollouts of another model",
                fix="give those of the run that the checkpoint is from",
            )
    if (longest := max(map(len, responses))) > ends.max_new_tokens:
        raise ConfigError(
            f"{source} has a response of {longest} tokens, and max_new_tokens is {ends.max_new_tokens}",
            cause="a run with longer responses",
            fix="set generation.max_new_tokens to that of the training",
        )
    retokenised = "response_ids" not in rows[0]
    sequences = BatchedSequences(
        sequence_ids_N=torch.arange(len(rows)),
        prompt_ids_N=prompt_ids_N,
        draws_N=torch.arange(len(rows)) % each,
        prompt_tokens=_flat(prompts),
        prompt_offsets_N1=_offsets(prompts),
        response_tokens_K=_flat(responses),
        response_offsets_N1=_offsets(responses),
        finish_reasons=tuple(map(_reason, rows, responses, [ends] * len(rows))),
    )
    return RecordedBatch(
        sequences,
        [row["reward"] for row in rows] if "reward" in rows[0] else None,
        torch.tensor([row["advantage"] for row in rows], dtype=torch.float64) if "advantage" in rows[0] else None,
        {
            name: torch.tensor([x for row in rows for x in row[name]], dtype=torch.float64)
            for name in OF_TOKENS
            if name in rows[0]
        },
        retokenised,
    )


def _responses(rows: Sequence[Row], tokenizer: Any, ends: Ends, source: str) -> list[list[int]]:
    """Token ids of the responses."""
    if "response_ids" in rows[0]:
        return [row["response_ids"] for row in rows]
    encoded = _encoded([row["response"] for row in rows], tokenizer, source)
    return [ids if len(ids) >= ends.max_new_tokens else [*ids, tokenizer.eos_token_id] for ids in encoded]


def _encoded(texts: Sequence[str], tokenizer: Any, source: str) -> list[list[int]]:
    if tokenizer.eos_token_id is None:
        raise PromptError(
            f"{source} has texts alone, and the tokenizer has no EOS token to end them with",
            fix="record token ids",
        )
    try:
        found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    except BaseException as error:  # tokenizers of all kinds raise errors of all kinds
        if not is_failure(error):
            raise
        raise PromptError(
            f"the tokenizer cannot encode the responses of {source}: {one_line(error)}",
            cause="rollouts of another model",
            fix="give those of the run that the checkpoint is from",
        ) from error
    return found


def _in_pool(firsts: Sequence[Row], pool: Pool, tokenizer: Any, source: str) -> list[int]:
    """Which prompt of the pool each group answers."""
    if "prompt_ids" in firsts[0]:
        of_ids = {tuple(ids): i for i, ids in reversed(list(enumerate(pool.token_ids)))}
        found = [of_ids.get(tuple(row["prompt_ids"])) for row in firsts]
    else:
        of_text: dict[str, int] = {}
        for i, (prompt, ids) in enumerate(zip(pool.prompts, pool.token_ids, strict=True)):
            of_text.setdefault(canonical(prompt), i)
            for skip in (False, True):  # trainers record what the policy was given, with and without special tokens
                of_text.setdefault(tokenizer.decode(ids, skip_special_tokens=skip), i)
        found = [of_text.get(canonical(row["prompt"])) for row in firsts]
    if None in found:
        row = firsts[found.index(None)]
        shown = row["prompt"] if "prompt" in row else tokenizer.decode(row["prompt_ids"])
        raise ConfigError(
            f"{found.count(None)} of {len(found)} prompts of {source} are none of the configuration's, for example "
            f"{shown!r:.80}",
            cause="another dataset or split, another chat template or special tokens, or rollouts of another model",
            fix="correct batch_config.dataset_name, U_split, and how prompts become tokens (add_special_tokens, "
            "apply_chat_template, system_prompt, max_prompt_length)",
        )
    return [i for i in found if i is not None]


def _reason(row: Row, response: Sequence[int], ends: Ends) -> FinishReason:
    """Why a response ended: by its last token, else where it was cut, else by a stop string."""
    if response[-1] in ends.eos:
        return "eos"
    if len(response) >= ends.max_new_tokens or row.get("finish_reason") == "length":
        return "length"
    return "stop"


def _flat(lists: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for tokens in lists for token in tokens], dtype=torch.long)


def _offsets(lists: Sequence[Sequence[int]]) -> Tensor:
    return ragged.offsets_from_lengths(torch.tensor([len(tokens) for tokens in lists], dtype=torch.long))

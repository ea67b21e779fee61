"""Tokenize a prompt pool: special tokens, chat template, token ids, and length limit, as in TRL's trainers.

TRL 1.16 tokenizes a text with the special tokens that the tokenizer adds, and a conversation by the chat template with
the beginning of the assistant's turn, whoever spoke last.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from entropy_core.errors import PromptError, one_line, shortage
from entropy_core.prompts.conversations import is_conversational
from entropy_core.prompts.pools import Pool
from entropy_core.prompts.templates import rendered


def encode(
    pool: Pool,
    tokenizer: Any,
    *,
    add_special_tokens: bool = False,
    apply_chat_template: bool = False,
    system_prompt: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_prompt_length: int = 0,
) -> tuple[Pool, list[list[int]]]:
    """Tokenize the prompts of a pool, and remove prompts that are too long.

    Args:
        pool: the prompts; conversations always go through the chat template.
        tokenizer: the checkpoint's tokenizer, from transformers.
        add_special_tokens: whether the tokenizer adds its special tokens to a text.
        apply_chat_template: make each text the user's turn of a conversation, followed by the start of the
            assistant's turn. The template writes the special tokens.
        system_prompt: content of a system turn before it; empty for none.
        chat_template_kwargs: further arguments of the chat template, such as `enable_thinking`.
        max_prompt_length: maximum number of tokens, including those of the template; 0 for no limit.

    Returns:
        The pool with the remaining prompts, and the token ids of each.

    Raises:
        PromptError: there is no chat template, a prompt cannot be encoded, or all prompts are too long.
    """
    prompts, notes = pool.table["prompt"].to_pylist(), pool.notes
    if is_conversational(pool.table):
        if system_prompt:
            raise PromptError(
                "batch_config.system_prompt is for prompts that are texts, and these are conversations",
                fix="remove it, and write the system turn into the prompts",
            )
        notes = (*notes, *_differences(pool, tokenizer))
        encoded = _in_template(prompts, tokenizer, chat_template_kwargs, "")
    elif apply_chat_template:
        before = [{"role": "system", "content": system_prompt}] if system_prompt else []
        turns = [[*before, {"role": "user", "content": text}] for text in prompts]
        encoded = _in_template(turns, tokenizer, chat_template_kwargs, system_prompt)
    else:
        encoded = _as_text(prompts, tokenizer, add_special_tokens)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise PromptError(
                f"prompt {prompt!r:.80} becomes 0 tokens",
                cause="the tokenizer drops all characters of this prompt",
                fix="use a dataset that fits this policy",
            )
    kept = [i for i, ids in enumerate(encoded) if not max_prompt_length or len(ids) <= max_prompt_length]
    if not kept:
        raise PromptError(
            f"all {len(encoded)} prompts are longer than max_prompt_length of {max_prompt_length} tokens; the shortest "
            f"has {min(map(len, encoded))}",
            fix="raise batch_config.max_prompt_length, or set it to 0 for no limit",
        )
    if len(kept) == len(encoded):
        return (pool if notes == pool.notes else Pool(pool.table, notes)), encoded
    note = (
        f"{len(encoded) - len(kept)} of {len(encoded)} prompts are longer than {max_prompt_length} tokens and were "
        "removed"
    )
    return Pool(pool.table.take(kept), (*notes, note)), [encoded[i] for i in kept]


def _as_text(texts: Sequence[str], tokenizer: Any, add_special_tokens: bool) -> list[list[int]]:
    try:
        return tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    except Exception as error:  # tokenizers of all kinds raise errors of all kinds
        raise shortage(error) or PromptError(
            f"the tokenizer of {tokenizer.name_or_path} cannot encode every prompt: {one_line(error)}",
            cause="the prompts contain characters that are not in its vocabulary",
            fix="use a dataset that fits this policy",
        ) from error


def _in_template(
    conversations: Sequence[list], tokenizer: Any, kwargs: Mapping[str, Any] | None, system_prompt: str
) -> list[list[int]]:
    if not tokenizer.chat_template:
        raise PromptError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template",
            cause="it is the tokenizer of a base model, which was not trained on conversations",
            fix="give prompts that are texts, with batch_config.apply_chat_template: false, or save your training "
            "template in the checkpoint directory as chat_template.jinja",
        )
    refused = {
        "cause": "it supports no system role" if system_prompt else "it does not support these turns",
        "fix": "remove batch_config.system_prompt" if system_prompt else "correct chat_template.jinja",
    }
    texts = rendered(tokenizer, conversations, kwargs or {}, refused)
    return _as_text(texts, tokenizer, add_special_tokens=False)


def _differences(pool: Pool, tokenizer: Any) -> list[str]:
    """Notes on what TRL does differently with these conversations, or may seem to."""
    notes = []
    if "chat_template_kwargs" in pool.table.column_names:
        notes.append(
            "the column chat_template_kwargs is passed to the reward only, as by TRL's GRPO and RLOO trainers; the "
            "template is given batch_config.chat_template_kwargs"
        )
    if getattr(tokenizer, "response_template", None) or getattr(tokenizer, "response_schema", None):
        notes.append(
            "the tokenizer has a response schema, by which TRL parses the responses for the reward; here the reward is "
            "given their text"
        )
    return notes

"""Tokenize a prompt pool: chat template, token ids, and length limit."""

from collections.abc import Sequence
from typing import Any

from entropy_core.errors import PromptError, one_line, shortage
from entropy_core.prompts.pools import Pool


def encode(
    pool: Pool,
    tokenizer: Any,
    *,
    add_special_tokens: bool = False,
    apply_chat_template: bool = False,
    system_prompt: str = "",
    max_prompt_length: int = 0,
) -> tuple[Pool, list[list[int]]]:
    """Tokenize the prompts of a pool, and remove prompts that are too long.

    Args:
        pool: the prompts.
        tokenizer: the checkpoint's tokenizer, from transformers.
        add_special_tokens: whether the tokenizer adds its special tokens.
        apply_chat_template: make each prompt the user's turn of a conversation, followed by the start of the
            assistant's turn. The template writes the special tokens.
        system_prompt: content of a system turn before it; empty for none.
        max_prompt_length: maximum number of tokens, including those of the template; 0 for no limit.

    Returns:
        The pool with the remaining prompts, and the token ids of each.

    Raises:
        PromptError: there is no chat template, a prompt cannot be encoded, or all prompts are too long.
    """
    texts = pool.table["prompt"].to_pylist()
    if apply_chat_template:
        texts = _conversations(texts, tokenizer, system_prompt)
    try:
        encoded = tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    except Exception as error:  # tokenizers of all kinds raise errors of all kinds
        raise shortage(error) or PromptError(
            f"the tokenizer of {tokenizer.name_or_path} cannot encode every prompt: {one_line(error)}",
            cause="the prompts contain characters that are not in its vocabulary",
            fix="use a dataset that fits this policy",
        ) from error
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise PromptError(
                f"prompt {text!r:.80} becomes 0 tokens",
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
        return pool, encoded
    note = (
        f"{len(encoded) - len(kept)} of {len(encoded)} prompts are longer than {max_prompt_length} tokens and were "
        "removed"
    )
    return Pool(pool.table.take(kept), (*pool.notes, note)), [encoded[i] for i in kept]


def _conversations(texts: Sequence[str], tokenizer: Any, system_prompt: str) -> list[str]:
    if not tokenizer.chat_template:
        raise PromptError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template",
            cause="it is the tokenizer of a base model, which was not trained on conversations",
            fix="set batch_config.apply_chat_template: false, or save your training template in the checkpoint "
            "directory as chat_template.jinja",
        )
    before = [{"role": "system", "content": system_prompt}] if system_prompt else []
    conversations = [[*before, {"role": "user", "content": text}] for text in texts]
    try:
        return tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may refuse a role
        raise PromptError(
            f"the chat template of {tokenizer.name_or_path} failed: {one_line(error)}",
            cause="it supports no system role" if system_prompt else "it does not support a single user turn",
            fix="remove batch_config.system_prompt" if system_prompt else "correct chat_template.jinja",
        ) from error

"""A pool of prompts as the policy reads them: chat template, tokens, and the limit on their length."""

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
    """The prompts as the policy reads them, and the pool without those that are too long.

    Args:
        pool: the prompts.
        tokenizer: of the checkpoint, one of transformers.
        add_special_tokens: whether the tokenizer adds its special tokens.
        apply_chat_template: whether a prompt becomes the user's turn of a conversation, in which the assistant's turn
            has just begun. The template writes the special tokens.
        system_prompt: the system's turn before it; empty for none.
        max_prompt_length: in tokens, those of the template included; 0 for no limit.

    Returns:
        The pool with the prompts that were kept, and the token ids of each.

    Raises:
        PromptError: there is no template, a prompt cannot be encoded, or all of them are too long.
    """
    texts = pool.table["prompt"].to_pylist()
    if apply_chat_template:
        texts = _conversations(texts, tokenizer, system_prompt)
    try:
        encoded = tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    except Exception as error:  # tokenizers of all kinds raise errors of all kinds
        raise shortage(error) or PromptError(
            f"the tokenizer of {tokenizer.name_or_path} cannot encode every prompt: {one_line(error)}",
            cause="the prompts have characters that its vocabulary does not have",
            fix="use a dataset that fits this policy",
        ) from error
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            raise PromptError(
                f"prompt {text!r:.80} becomes 0 tokens",
                cause="the prompts are for another tokenizer",
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
        "left out"
    )
    return Pool(pool.table.take(kept), (*pool.notes, note)), [encoded[i] for i in kept]


def _conversations(texts: Sequence[str], tokenizer: Any, system_prompt: str) -> list[str]:
    if not tokenizer.chat_template:
        raise PromptError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template",
            cause="it is that of a base model, which was never taught to chat",
            fix="set batch_config.apply_chat_template: false, or save the template that you train with into the "
            "checkpoint directory, as chat_template.jinja",
        )
    before = [{"role": "system", "content": system_prompt}] if system_prompt else []
    conversations = [[*before, {"role": "user", "content": text}] for text in texts]
    try:
        return tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and may refuse a role
        raise PromptError(
            f"the chat template of {tokenizer.name_or_path} failed: {one_line(error)}",
            cause="it knows no system role" if system_prompt else "it is not for conversations of this form",
            fix="set batch_config.system_prompt to nothing" if system_prompt else "correct chat_template.jinja",
        ) from error

"""Chat templates, rendered where they cannot hang the sweep.

A template is a program that a checkpoint brings: jinja keeps it from files and from Python, but not from loops within
loops or from a text that fills the memory. It is rendered in a process of its own, see `isolation`.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from entropy_core.errors import PromptError, one_line
from entropy_core.isolation.process import Isolation

SECONDS, GIGABYTES, LARGEST = 10.0, 4.0, 2**26
"""Limits for all conversations of a pool together."""
MORE_SECONDS, MORE_GIGABYTES, MORE_LARGEST = 0.01, 1e-4, 2**16
"""What each conversation adds to them: a hundred times what a usual one takes."""


def rendered(
    tokenizer: Any, conversations: Sequence[list], kwargs: Mapping[str, Any], refused: Mapping[str, str]
) -> list[str]:
    """Render conversations by a tokenizer's template, as its `apply_chat_template` does.

    Args:
        tokenizer: from transformers, with a chat template.
        conversations: lists of messages.
        kwargs: further arguments of the template.
        refused: cause and fix of an error that the template raises.

    Returns:
        The texts, each with the beginning of the assistant's turn.

    Raises:
        PromptError: the template fails, or takes more time or memory than it may, or an argument is none of its own.
    """
    whose = f"the chat template of {tokenizer.name_or_path}"
    ours = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents", "chat_template"}
    if wrong := sorted(ours & kwargs.keys()):
        raise PromptError(
            f"batch_config.chat_template_kwargs has {wrong[0]!r}, which no chat template is given",
            cause="it is an argument of transformers' apply_chat_template",
            fix="remove it",
        )
    given = {**tokenizer.special_tokens_map, **kwargs}
    limits = Isolation(
        seconds=SECONDS + MORE_SECONDS * len(conversations), gigabytes=GIGABYTES + MORE_GIGABYTES * len(conversations)
    )
    try:
        template = tokenizer.get_chat_template(given.pop("chat_template", None), given.get("tools"))
    except Exception as error:  # as where there are several, and none is the default
        raise PromptError(f"{whose} failed: {one_line(error)}", **refused) from error
    largest = LARGEST + MORE_LARGEST * len(conversations)
    try:
        answer = limits.call(
            render, template, list(conversations), given, whose=whose, file="", error=PromptError, largest=largest
        )
    except PromptError as error:  # one of the limits
        raise PromptError(
            error.fact, cause="loops within loops, or a text without end", fix="correct chat_template.jinja"
        ) from None
    found: Any = None
    with suppress(ValueError, RecursionError):
        found = json.loads(answer)
    if isinstance(found, str):
        raise PromptError(f"{whose} failed: {found}", **refused)
    if not isinstance(found, list) or [type(text) for text in found] != [str] * len(conversations):
        raise PromptError(f"{whose} made something else than {len(conversations)} texts", **refused)
    return found


def render(template: str, conversations: Sequence[list], given: Mapping[str, Any]) -> bytes:
    """In that process: the texts as JSON, or what the template failed with."""
    said = [[{name: of for name, of in turn.items() if of is not None} for turn in turns] for turns in conversations]
    found: list[str] | str
    try:
        found, _ = render_jinja_template(
            conversations=said, chat_template=template, add_generation_prompt=True, **given
        )
    except Exception as error:  # a template is a program, and may refuse a role
        found = one_line(error)
    return json.dumps(found).encode()

"""Prompts that are conversations: lists of messages, each with `role` and `content`, as chat templates take them."""

import json
from typing import Any

import pyarrow as pa


def is_conversational(table: pa.Table) -> bool:
    """Whether the prompts of a pool are conversations; else they are text."""
    return pa.types.is_list(table.schema.field("prompt").type)


def fault_of(value: Any) -> str:
    """What is wrong with a conversation, to follow "row N "; empty for none."""
    if not value:
        return "has a conversation of no messages"
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            return f"has a message {number} that is {type(message).__name__}, not an object with role and content"
        if not isinstance(message.get("role"), str):
            shape = "; it has `from` and `value`, which are to be renamed" if "from" in message else ""
            return f"has a message {number} without a role{shape}"
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            return f"has a message {number} with parts that are not text, such as images, which are not modelled"
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            return f"has a message {number} without content"
    return ""


def canonical(prompt: Any) -> str:
    """One text for equal prompts: a text itself, or the messages of a conversation without what is not set."""
    if isinstance(prompt, str):
        return prompt
    messages = [{name: of for name, of in message.items() if of is not None} for message in prompt]
    return json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str)


def as_messages(responses: list[str]) -> list[list[dict[str, str]]]:
    """Responses as the rewards of conversations are given them: each one turn of the assistant."""
    return [[{"role": "assistant", "content": text}] for text in responses]

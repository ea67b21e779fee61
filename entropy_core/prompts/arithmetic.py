"""The task of the demo run: addition with a written-out scratchpad, one token per character.

    prompt     358+67=
    response   780>15,561>12,031>04;425
               │││ └┴ the column's sum: the carry out, then the digit that stays
               ││└ the carry in
               └┴ the column's two digits, in either order; columns start at the ones
    answer     the part after the last `;`, without leading zeros

The order of a column's two digits is a coin toss that does not affect the reward. A policy that learns the task keeps
its entropy there and loses its entropy about sums and carries.

Operands have two or three digits, so a response has 16 to 25 characters. This is short enough to train on a laptop and
long enough for a wrong digit in the scratchpad to matter later. Lengths differ, so means per token and per sequence
differ. The text contains no end-of-sequence token; the tokenizer adds it.
"""

import hashlib
import random
from typing import Any

from entropy_core.errors import PromptError

CHARACTERS = "0123456789+=>,;"
"""All characters of prompts and solutions, the vocabulary of a character-level tokenizer."""

SPLITS = ("train", "test")
MAX_SIZE = 100_000

_LOW, _HIGH = 10, 999  # operands, inclusive
_TEST_BYTES = 64  # a prompt whose digest starts with a byte below this (one in four) belongs to `test`


def problems(split: str, size: int = 512) -> list[dict[str, str]]:
    """Generate distinct addition problems, the same in every process and on every machine.

    A digest of its text assigns each prompt to one split, so the splits are disjoint for all sizes. A smaller `size`
    gives a prefix of a larger one.

    Args:
        split: `train` or `test`.
        size: number of problems, from 1 to `MAX_SIZE`.

    Returns:
        One dictionary per problem: `prompt`, `answer`, and `solution`, the target response for supervised training.

    Raises:
        PromptError: the split is unknown, or the size is out of range.
    """
    if split not in SPLITS:
        raise PromptError(
            f"The arithmetic task has no split {split!r}",
            cause="a misspelt name in the configuration",
            fix=f"set batch_config.split to one of {', '.join(SPLITS)}",
        )
    if not 1 <= size <= MAX_SIZE:
        raise PromptError(
            f"The arithmetic task was asked for {size} problems",
            fix=f"ask for 1 to {MAX_SIZE}",
        )
    rng = random.Random(_digest(f"arithmetic/{split}"))
    found: dict[str, dict[str, str]] = {}
    while len(found) < size:
        a, b = (_operand(rng) for _ in range(2))
        prompt = f"{a}+{b}="
        if prompt not in found and _split_of(prompt) == split:
            found[prompt] = {"prompt": prompt, "answer": str(a + b), "solution": _solution(a, b, rng)}
    return list(found.values())


def extract_answer(response: str) -> str:
    """Return the final answer of a response, the part after its last `;`; an empty string if there is no `;`.

    Args:
        response: the text of a response, without special tokens.

    Returns:
        The answer, stripped of white space.
    """
    _, semicolon, answer = response.rpartition(";")
    return answer.strip() if semicolon else ""


def exact_match(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Return 1 if the final answer equals the reference answer, character by character, else 0.

    Args:
        completions: the responses.
        answer: the reference answers, in the same order.

    Returns:
        One reward per response.
    """
    return [float(extract_answer(c) == a) for c, a in zip(completions, answer, strict=True)]


def _operand(rng: random.Random) -> int:
    digits = rng.choice((2, 3))
    return rng.randint(max(_LOW, 10 ** (digits - 1)), min(_HIGH, 10**digits - 1))


def _solution(a: int, b: int, rng: random.Random) -> str:
    columns, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = (n // 10**place % 10 for n in ((a, b) if rng.random() < 0.5 else (b, a)))
        columns.append(f"{x}{y}{carry}>{x + y + carry:02d}")
        carry = (x + y + carry) // 10
    return ",".join(columns) + f";{a + b}"


def _split_of(prompt: str) -> str:
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] < _TEST_BYTES else "train"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])

"""Rewards for mathematics: a final answer is found in the response and compared with the right one.

The right answer is the column `answer`, or `solution` where the pool has no `answer`: of a text with `####` what
follows it, of one with \\boxed{…} what is in the last of them, and else the whole text.

Whether two expressions are equal math-verify decides. It may think for ever (of 10^{10^{10}}, say), and its own time
limits need the main thread, which the stages may not run in; so it works in a process of its own, which the operating
system ends where a pair takes too long. That is an error: the reward of such a response is not known to be 0.
"""

import importlib.metadata
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from entropy_core.errors import ConfigError, RewardError, one_line

SECONDS = 20
"""For one pair, once the library is loaded."""


def gsm8k(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the first number after `####` in the response is that of the column `answer`; else 0.

    Reference: the evaluation of github.com/openai/grade-school-math.
    """
    golds = [_number(text if "####" in text else f"#### {text}") for text in answer]
    for i, gold in enumerate(golds):
        if gold is None:
            raise _no_answer(i, answer[i])
    return [float(_number(c) == gold) for c, gold in zip(completions, golds, strict=True)]


def boxed(completions: Sequence[str], answer: Any = None, solution: Any = None, **_: Any) -> list[float]:
    """1 where the last \\boxed{…} of the response equals the right answer; else 0."""
    return _verified([last_boxed(c) for c in completions], answer, solution)


def answer_tag(completions: Sequence[str], answer: Any = None, solution: Any = None, **_: Any) -> list[float]:
    """1 where the last <answer>…</answer> of the response equals the right answer; else 0.

    Of an answer with a \\boxed{…} in it, what is in the box counts.
    """
    found = [re.findall(r"<answer>(.*?)</answer>", c, re.DOTALL) for c in completions]
    return _verified([_inside(texts[-1]) if texts else "" for texts in found], answer, solution)


def last_boxed(text: str) -> str:
    """What is in the last \\boxed{…} of a text, braces matched; empty where there is none, or it is not closed."""
    _, command, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0) if rest[i - 1 : i] != "\\" else 0
        if depth == 0:
            return rest[:i].strip() if command else ""
    return ""


def version() -> str:
    """The library's name and version.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return f"math-verify {importlib.metadata.version('math-verify')}"
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "the rewards boxed and answer_tag need math-verify, which is not installed",
            cause="entropy-probe was installed without its math extra",
            fix="pip install -e '.[math]'",
        ) from None


def _verified(found: list[str], answer: Any, solution: Any) -> list[float]:
    version()
    right = answer if answer is not None else solution
    if right is None:
        raise RewardError(
            "the pool has no right answers: neither a column `answer` nor a column `solution`",
            fix="add one of them to the prompts, or use another reward",
        )
    pairs: dict[tuple[str, str], list[int]] = {}
    for i, (text, gold) in enumerate(zip(found, right, strict=True)):
        if not isinstance(gold, str) or not _inside(gold):
            raise _no_answer(i, gold)
        if text:
            pairs.setdefault((_inside(gold), text), []).append(i)
    rewards = [0.0] * len(found)
    for (pair, sequences), equal in zip(pairs.items(), _equal(list(pairs)), strict=False):
        if equal is None:
            raise RewardError(
                f"math-verify did not decide within {SECONDS} s whether {pair[1]!r:.80} is {pair[0]!r:.80}, in "
                f"sequence {sequences[0]}",
                cause="a response with a very large power, or a very long expression",
                fix="use a reward function of your own that decides such cases as your trainer does",
            )
        for i in sequences:
            rewards[i] = float(equal)
    return rewards


def _equal(pairs: list[tuple[str, str]]) -> list[bool | None]:
    """Whether each pair is equal, up to the first that is not decided in time, which is None.

    Raises:
        RewardError: the process that compares ended in another way.
    """
    if not pairs:
        return []
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, str(SECONDS)],
        cwd=Path(__file__).parents[2],  # so that -m finds this copy of the package
        input="".join(json.dumps(pair) + "\n" for pair in pairs),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    verdicts: list[bool | None] = [line == "1" for line in done.stdout.splitlines()]
    if len(verdicts) < len(pairs) and done.returncode != -signal.SIGALRM:
        raise RewardError(
            f"math-verify failed on {pairs[len(verdicts)][1]!r:.80}: "
            f"{one_line(Exception(done.stderr.strip().rpartition(chr(10))[2] or f'exit status {done.returncode}'))}",
            fix="use a reward function of your own",
        )
    return verdicts if len(verdicts) == len(pairs) else [*verdicts, None]


def _inside(text: str) -> str:
    """The final answer in a text."""
    return (last_boxed(text) or text.rpartition("####")[2]).strip().strip("$").strip()


def _number(text: str) -> Decimal | None:
    found = re.search(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    return Decimal(found[1].replace(",", "")) if found else None


def _no_answer(i: int, answer: Any) -> RewardError:
    return RewardError(
        f"the right answer of sequence {i} is {answer!r:.80}, in which there is no answer",
        cause="the column `answer` is empty in this row of the pool, or of another kind",
        fix="correct the prompts, or use another reward",
    )


def _compare(seconds: int) -> None:
    """Read pairs as lines of JSON and write 1 or 0 for each of them; the alarm ends this where one takes too long."""
    from math_verify import parse, verify

    for line in sys.stdin:
        signal.alarm(seconds)
        right, found = (f"\\boxed{{{text}}}" for text in json.loads(line))
        equal = right == found or verify(
            parse(right, parsing_timeout=None), parse(found, parsing_timeout=None), timeout_seconds=None
        )
        print(int(equal), flush=True)


if __name__ == "__main__":
    _compare(int(sys.argv[1]))

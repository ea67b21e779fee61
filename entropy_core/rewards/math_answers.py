"""Rewards for mathematics: extract the final answer of each response and compare it with the reference answer.

The reference answer comes from the column `answer`, or from `solution` if the pool has no `answer`. It is the content
of the last \\boxed{…} in that string, else the part after the last `####`, else the whole string.

math-verify decides whether two expressions are equal. It may never finish (on 10^{10^{10}}, for example), and its own
timeouts only work in the main thread, where stages need not run. It therefore runs in a separate process, which the
operating system kills if a pair takes too long. A timeout is an error and not a reward of 0, because the answer may
be right.
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
"""Time limit for one pair of answers, after the library has been loaded."""


def gsm8k(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 if the first number after `####` in the response equals the one in the column `answer`, else 0.

    Reference: the evaluation of github.com/openai/grade-school-math.
    """
    golds = [_number(text if "####" in text else f"#### {text}") for text in answer]
    for i, gold in enumerate(golds):
        if gold is None:
            raise _no_answer(i, answer[i])
    return [float(_number(c) == gold) for c, gold in zip(completions, golds, strict=True)]


def boxed(completions: Sequence[str], answer: Any = None, solution: Any = None, **_: Any) -> list[float]:
    """Return 1 if the last \\boxed{…} of the response equals the reference answer, else 0."""
    return _verify([last_boxed(c) for c in completions], answer, solution)


def answer_tag(completions: Sequence[str], answer: Any = None, solution: Any = None, **_: Any) -> list[float]:
    """Return 1 if the last <answer>…</answer> of the response equals the reference answer, else 0.

    If the tag contains a \\boxed{…}, only the content of the box is compared.
    """
    found = [re.findall(r"<answer>(.*?)</answer>", c, re.DOTALL) for c in completions]
    return _verify([_final_answer(texts[-1]) if texts else "" for texts in found], answer, solution)


def last_boxed(text: str) -> str:
    """Return the content of the last \\boxed{…}, with matched braces; empty if there is none or it is not closed."""
    _, command, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0) if rest[i - 1 : i] != "\\" else 0
        if depth == 0:
            return rest[:i].strip() if command else ""
    return ""


def version() -> str:
    """Return the name and version of math-verify.

    Raises:
        ConfigError: math-verify is not installed.
    """
    try:
        return f"math-verify {importlib.metadata.version('math-verify')}"
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "the rewards boxed and answer_tag need math-verify, which is not installed",
            cause="entropy-probe was installed without its math extra",
            fix="pip install -e '.[math]'",
        ) from None


def _verify(found: list[str], answer: Any, solution: Any) -> list[float]:
    version()
    right = answer if answer is not None else solution
    if right is None:
        raise RewardError(
            "the prompts have no reference answers: neither a column `answer` nor a column `solution`",
            fix="add one of these columns to the prompts, or use another reward",
        )
    pairs: dict[tuple[str, str], list[int]] = {}
    for i, (text, gold) in enumerate(zip(found, right, strict=True)):
        if not isinstance(gold, str) or not _final_answer(gold):
            raise _no_answer(i, gold)
        if text:
            pairs.setdefault((_final_answer(gold), text), []).append(i)
    rewards = [0.0] * len(found)
    for (pair, sequences), equal in zip(pairs.items(), _equal(list(pairs)), strict=False):
        if equal is None:
            raise RewardError(
                f"math-verify did not decide within {SECONDS} s whether {pair[1]!r:.80} is {pair[0]!r:.80}, in "
                f"sequence {sequences[0]}",
                cause="a response with a very large power, or a very long expression",
                fix="write a reward function that treats such responses as your trainer does",
            )
        for i in sequences:
            rewards[i] = float(equal)
    return rewards


def _equal(pairs: list[tuple[str, str]]) -> list[bool | None]:
    """Tell whether the two answers of each pair are equal.

    Returns:
        One bool per pair, in order; if a pair times out, the list ends with None for that pair.

    Raises:
        RewardError: the comparing process ended for a reason other than a timeout.
    """
    if not pairs:
        return []
    process = subprocess.run(
        [sys.executable, "-m", __spec__.name, str(SECONDS)],
        cwd=Path(__file__).parents[2],  # so that -m finds this copy of the package
        input="".join(json.dumps(pair) + "\n" for pair in pairs),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    verdicts: list[bool | None] = [line == "1" for line in process.stdout.splitlines()]
    if len(verdicts) < len(pairs) and process.returncode != -signal.SIGALRM:
        raise RewardError(
            f"math-verify failed on {pairs[len(verdicts)][1]!r:.80}: "
            + one_line(Exception(process.stderr.strip().rpartition("\n")[2] or f"exit status {process.returncode}")),
            fix="write a reward function of your own for such answers",
        )
    return verdicts if len(verdicts) == len(pairs) else [*verdicts, None]


def _final_answer(text: str) -> str:
    """Return the content of the last \\boxed{…}, else the part after the last `####`, else the whole string."""
    return (last_boxed(text) or text.rpartition("####")[2]).strip().strip("$").strip()


def _number(text: str) -> Decimal | None:
    found = re.search(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    return Decimal(found[1].replace(",", "")) if found else None


def _no_answer(i: int, answer: Any) -> RewardError:
    return RewardError(
        f"the reference answer of sequence {i}, {answer!r:.80}, contains no answer that this reward can read",
        cause="the column `answer` is empty in this row of the prompts, or has another format",
        fix="correct this row of the prompts, or use another reward",
    )


def _compare(seconds: int) -> None:
    """Read pairs as lines of JSON and print 1 or 0 for each; an alarm kills the process if a pair takes too long."""
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

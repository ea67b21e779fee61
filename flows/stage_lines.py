"""One line for all shards of a stage, and one for what was reused: how the stages of a run are told to a reader."""

import re
from collections.abc import Iterable, Sequence

PART = re.compile(r" · (?:shard|draw) (\d+)/(\d+)$")
"""What the label of a stage's run ends with, where the stage has several for one thing."""
_NAMED = 4  # stages in a line of what was reused


def whole(label: str) -> str:
    """What a run of a stage is of, without which part of it: "checkpoint-20 · shard 3/16" → "checkpoint-20"."""
    return PART.sub("", label)


def stage_line(state: str, stage: str, of: str, detail: str = "") -> str:
    """Say how a stage ended: `computed  score-e-batch · checkpoint-20  (16 shards, 34 s)`."""
    name = f"{stage} · {of}" if of else stage
    return f"{state:9} {name}  ({detail})" if detail else f"{state:9} {name}"


def reused_line(stages: Sequence[str]) -> str:
    """Say in one line what was found in the store, as many runs of stages as there are names.

    Args:
        stages: the name of each run's stage, in order.
    """
    names = list(dict.fromkeys(stages))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    runs = f"{len(stages)} stage run{'s' if len(stages) > 1 else ''}"
    return f"{'reused':9} {runs}: {', '.join(names[:_NAMED])}{more}"


def recorded_lines(ended: Iterable[tuple[str, str]]) -> list[str]:
    """Tell a record of runs of stages.

    Args:
        ended: a state (`computed`, `reused`, `failed` or another) and the name of the run ("stage · label"), in order.

    Returns:
        A line for all parts of a stage in one state, and at the end one for all that was reused.
    """
    groups: dict[tuple[str, str], int] = {}
    reused = []
    for state, name in ended:
        if state == "reused":
            reused.append(name.partition(" · ")[0])
        else:
            groups[state, whole(name)] = groups.get((state, whole(name)), 0) + 1
    lines = [
        stage_line(state, *name.partition(" · ")[::2], detail=f"{count} parts" if count > 1 else "")
        for (state, name), count in groups.items()
    ]
    return lines + ([reused_line(reused)] if reused else [])


def not_told(lines: Sequence[str], told: Iterable[str]) -> list[str]:
    """Leave out what a reader has been told already, in lines of a run under way.

    Args:
        lines: of `recorded_lines`.
        told: lines that were shown, whatever they say of time and parts.
    """
    known = {_without_detail(line) for line in told}
    runs_reused = sum(_reused(line) for line in told)
    return [
        line
        for line in lines
        if (_reused(line) != runs_reused if _reused(line) else _without_detail(line) not in known)
    ]


def _without_detail(line: str) -> str:
    return re.sub(r"  \([^()]*\)$", "", line).strip()


def _reused(line: str) -> int:
    found = re.match(r" *reused +(\d+) stage runs?:", line)
    return int(found[1]) if found else 0

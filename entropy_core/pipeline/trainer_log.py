"""What the trainer of a checkpoint logged near it, and how it averages: plain values, as inputs of a stage."""

import math
from collections.abc import Sequence
from typing import Any

from entropy_core.checkpoints.trainer_files import TrainerFiles
from entropy_core.config.trainer_settings import readings
from entropy_core.estimates.trainer_agreement import ENTRIES, LONGEST, QUANTITIES

_KEPT = {*QUANTITIES.values(), LONGEST}


def trainer_log(step: int, files: TrainerFiles, others: Sequence[TrainerFiles]) -> dict[str, Any]:
    """Collect what the trainer's files say of the policy near a checkpoint.

    Args:
        step: of the checkpoint.
        files: of the checkpoint.
        others: of all checkpoints of the sweep; the log of a later one of the same run goes on after this step.

    Returns:
        `entries`, as `trainer_agreement.compared` takes them; `prompts` and `responses_per_prompt` of a step, and
        `micro_batch`, the responses over which the trainer averages at once, each 0 where it is not known; `top_p` and
        `top_k` of its sampling.
    """
    own = _history(files)
    longest = max((_history(other) for other in others), key=len, default=own)
    history = longest if longest[: len(own)] == own else own
    near = sorted(history, key=lambda entry: abs(entry["step"] - step))[: 2 * ENTRIES]
    said = {reading.key: reading.value for reading in readings(files)[0]}
    prompts, group = said.get("batch_config.B_U", 0), said.get("batch_config.G", 0)
    accumulated = _number(files.arguments.get("gradient_accumulation_steps"))
    return {
        "entries": sorted(near, key=lambda entry: entry["step"]),
        "prompts": prompts,
        "responses_per_prompt": group,
        "micro_batch": int(prompts * group // accumulated) if accumulated >= 1 else 0,
        "top_p": _number(files.arguments.get("top_p")) or 1.0,
        "top_k": int(_number(files.arguments.get("top_k"))),
    }


def _history(files: TrainerFiles) -> list[dict[str, float]]:
    """The entries of the training, by step, each with the step of the one before it."""
    found: dict[int, dict[str, float]] = {}
    for entry in files.log:
        kept = {name: float(entry[name]) for name in _KEPT if _is_number(entry.get(name))}
        step = entry.get("step")
        if kept and isinstance(step, int) and step > 0:
            found[step] = kept  # of a step that was taken twice, after a restart, the later one
    history, since = [], 0
    for step, kept in sorted(found.items()):
        history.append({"step": step, "since": since, **kept})
        since = step
    return history


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else 0.0

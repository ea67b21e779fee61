"""Write a configuration from the files of a run, for `entropy-probe init`."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from entropy_core.checkpoints.trainer_files import TrainerFiles
from entropy_core.config import plain_yaml
from entropy_core.config.paths import FILL_IN, Origin
from entropy_core.config.read import parse_config
from entropy_core.config.schema import ProbeConfig
from entropy_core.config.trainer_differences import LEFT_OUT
from entropy_core.errors import ConfigError
from entropy_core.files.checkpoint import RUN_HINT
from entropy_core.pipeline.settings import ASSUMED, Setting, Settled
from entropy_core.pipeline.usable import read_settings

_SECTIONS = ("policy", "batch_config", "generation", "update")
_OWN = {"batch_config.E_total_sequences": "your choice: more sequences, narrower intervals"}
_UNKNOWN = {  # what no checkpoint records
    "batch_config.dataset_name": "which prompts? A file or folder, OWNER/NAME on the hub, or a known dataset",
    "update.reward": "which reward? A known one, file.py:function, or package.module:function",
}
_QUIET = (
    *("batch_config.system_prompt", "batch_config.chat_template_kwargs", "batch_config.max_prompt_length"),
    "generation.stop_strings",
)


def configuration_of(run: Path, folder: Path) -> str:
    """Write a configuration for the checkpoints of a run, with a comment on where each setting comes from.

    Args:
        run: a run directory, or one checkpoint.
        folder: the folder that the file will be in; relative paths start there.

    Returns:
        YAML. It can be run unchanged if it has nothing to fill in.

    Raises:
        ProbeError: there is nothing to probe, or its checkpoints were not trained alike.
    """
    hint = _hint(run)
    asked = {
        "checkpoints": [str(run.absolute())],
        "policy": {"base_model": hint.get("policy.base_model", "")},
        "update": {"leave_out": sorted(LEFT_OUT)},
    }
    config, settled, trainers = read_settings(parse_config(asked, origin=Origin(Path.cwd(), must_exist=True)))
    return "\n".join(_lines(run, folder, hint, config, settled, trainers)) + "\n"


def _lines(
    run: Path,
    folder: Path,
    hint: Mapping[str, Any],
    config: ProbeConfig,
    settled: Settled,
    trainers: Mapping[str, TrainerFiles],
) -> Iterator[str]:
    names, logged = list(trainers), next(iter(trainers.values())).rewards
    about = f"Made by `entropy-probe init {run}`. A line with `assumed` is a guess: see whether it is so."
    yield f"# {_one_comment(about)}"
    for code in _code_in(hint):
        yield f"# WARNING: {RUN_HINT} names code, which a sweep executes; read it first: {_one_comment(code)}"
    for warning in settled.warnings:
        yield f"# WARNING: {_one_comment(warning)}"
    path = str(run) if run.is_absolute() else os.path.relpath(run, folder)
    some = _one_comment(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}")
    yield f"name: {re.sub(r'[^A-Za-z0-9_.-]', '-', run.resolve().name).lstrip('.-') or 'probe'}"
    yield f"checkpoints: {_flow([path])}    # {len(names)} of them, {some}; paths start at the folder of this file"
    by_section: dict[str, list[tuple[str, Any, str]]] = {section: [] for section in _SECTIONS}
    for key, why in _OWN.items():
        section, _, name = key.partition(".")
        if key not in hint:
            by_section[section].append((name, getattr(getattr(config, section), name), why))
    for setting in settled.settings:
        section, _, name = setting.key.partition(".")
        if (said := _said(setting, hint)) is not None:
            value, why = said
            if value == FILL_IN and name == "reward" and logged:
                value = [FILL_IN] * len(logged) if len(logged) > 1 else value
                why += f"; the trainer logged {', '.join(logged)}"
            by_section[section].append((name, value, why))
    shown = {setting.key for setting in settled.settings}
    for key, value in hint.items():
        section, _, name = key.partition(".")
        if key not in shown:
            by_section[section].append((name, value, f"read from {RUN_HINT}"))
    for section, entries in by_section.items():
        if entries:
            yield f"{section}:"
        for name, value, why in entries:
            line = f"{name}: {_flow(value)}"
            yield f"  {line:32} # {_one_comment(why)}"
        if section == "update":
            if not any(name == "learning_rate" for name, *_ in entries):
                yield "  # learning_rate: that of each checkpoint's optimizer.pt"
            if settled.left_out:
                yield f"  # leave_out: {_flow(list(settled.left_out))}    # to go on without what is warned of above"


def _said(setting: Setting, hint: Mapping[str, Any]) -> tuple[Any, str] | None:
    """Return the value of a setting and its comment; None for a setting that needs no line."""
    if setting.key in hint:
        return hint[setting.key], f"read from {RUN_HINT}"
    if setting.key in _UNKNOWN:
        return FILL_IN, f"{ASSUMED}: {_UNKNOWN[setting.key]}"
    if setting.source.startswith("set") or setting.key in ("update.learning_rate", "policy.base_model"):
        return None
    if setting.source == ASSUMED and setting.key in _QUIET:
        return None
    return setting.value, setting.source


def _hint(run: Path) -> dict[str, Any]:
    """Read the run's own `entropy-probe.yaml`: its values by key, with absolute paths."""
    if not (run / RUN_HINT).exists():
        return {}
    values, repeated = plain_yaml.read(run / RUN_HINT)
    if repeated or not isinstance(values, dict) or not set(values) <= set(_SECTIONS):
        raise ConfigError(f"{run / RUN_HINT} is no part of a configuration", fix=f"it may have {', '.join(_SECTIONS)}")
    asked = {"checkpoints": [str(run)]} | values
    config = parse_config(asked, str(run / RUN_HINT), Origin(run.absolute()))
    return {f"{name}.{key}": getattr(getattr(config, name), key) for name, of in values.items() for key in of}


def _code_in(hint: Mapping[str, Any]) -> list[str]:
    """The functions of a file or a package that a run's hint names."""
    values = [hint.get(key) or () for key in ("update.reward", "update.loss")]
    names = [name for value in values for name in ([value] if isinstance(value, str) else value)]
    return [name for name in names if ":" in name]


def _flow(value: Any) -> str:
    """Format a value as YAML on one line."""
    if isinstance(value, BaseModel):  # a section within a section
        value = value.model_dump(mode="json", exclude_unset=True)
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else plain_yaml.scalar(value)


def _one_comment(text: str) -> str:
    return " ".join(text.split())

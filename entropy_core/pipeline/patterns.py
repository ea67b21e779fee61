"""The patterns by which an adapter names modules of its base, tried where they cannot hang the sweep.

PEFT matches them as regular expressions against the name of every module. Some take longer than a life to say no, such
as `(a*)*b`, and nothing in the process could stop that.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from entropy_core.checkpoints.adapter_files import ADAPTER_CONFIG, adapter_settings
from entropy_core.checkpoints.architecture import module_names
from entropy_core.checkpoints.layout import Layout
from entropy_core.errors import CheckpointError
from entropy_core.files.checkpoint import SAVE_AGAIN
from entropy_core.isolation.process import Isolation

LIMITS = Isolation(seconds=10.0, gigabytes=4.0)
"""What all patterns of an adapter may take together."""


def require_quick_patterns(layout: Layout) -> None:
    """Refuse an adapter whose patterns do not come to an end, without matching one of them in this process.

    Args:
        layout: of a checkpoint, or of a reference policy.

    Raises:
        CheckpointError: it has such patterns, or its files cannot be read.
    """
    if layout.base is None:
        return
    path = layout.model / ADAPTER_CONFIG
    patterns = list(_patterns(adapter_settings(layout.model)))
    if not patterns:
        return
    arguments = patterns, module_names(layout.architecture)
    try:
        LIMITS.call(match_all, *arguments, whose="an adapter", file="", error=CheckpointError, largest=2**16)
    except CheckpointError:
        raise CheckpointError(
            f"{path} names modules by patterns that take longer than {LIMITS.seconds:g} s to match",
            cause="repetitions within repetitions, such as (a*)*",
            fix=SAVE_AGAIN,
        ) from None


def match_all(patterns: Sequence[str], names: Sequence[str]) -> bytes:
    """Match every pattern against every name. What is no pattern is left to PEFT to refuse."""
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            continue
        for name in names:
            compiled.match(name)
            compiled.fullmatch(name)
    return b""


def _patterns(config: dict[str, Any]) -> Iterator[str]:
    """Those that are more than a name, as PEFT completes them."""
    forms = {
        "target_modules": "{}",
        "exclude_modules": "{}",
        "modules_to_save": r"(^|.*\.){}($|\..*)",
        "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
        "rank_pattern": r"(.*\.)?({})$",
        "alpha_pattern": r"(.*\.)?({})$",
    }
    for key, form in forms.items():
        said = config.get(key) or ()
        for pattern in [said] if isinstance(said, str) else said if isinstance(said, list | dict) else ():
            if isinstance(pattern, str) and not re.fullmatch(r"[\w.-]*", pattern):
                yield form.replace("{}", pattern)

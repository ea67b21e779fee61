"""How much longer a tokenizer makes a text: it is a program of replacements, and forty that double fill any memory."""

from pathlib import Path
from typing import Any

from entropy_core.checkpoints.content import read_json
from entropy_core.errors import CheckpointError

MOST = 1000.0
"""Characters that may come of one: a table of SentencePiece and a few replacements come to a hundred at most."""

_BY_TYPE = {"Precompiled": 20.0, "NFKC": 4.0, "NFKD": 4.0, "NFC": 3.0, "NFD": 3.0, "Lowercase": 3.0}


def require_moderate(directory: Path) -> None:
    """Refuse a tokenizer that makes very long texts of short ones, by what its files say; none of it is run.

    Args:
        directory: with the tokenizer's files.

    Raises:
        CheckpointError: it has such a tokenizer.
    """
    for path in sorted(directory.glob("tokenizer*.json")):
        try:
            said = read_json(path)
        except CheckpointError:  # whoever loads it will say what is wrong with it
            continue
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if (factor := _growth(said.get(part))) > MOST:
                raise CheckpointError(
                    f"the {part} of {path} makes up to {factor:.3g} characters of one",
                    cause="replacements of replacements, or one by a long text",
                    fix="save the tokenizer with tokenizer.save_pretrained",
                )


def _growth(part: Any) -> float:
    """Characters that may come of one."""
    if not isinstance(part, dict):
        return 1.0
    factor = _BY_TYPE.get(str(part.get("type")), 1.0)
    if part.get("type") == "Replace":
        factor = _replacement(part.get("pattern"), len(str(part.get("content"))))
    elif part.get("type") == "Prepend":
        factor = 1.0 + len(str(part.get("prepend")))
    for key in ("normalizers", "pretokenizers", "decoders"):
        for child in part[key] if isinstance(part.get(key), list) else ():
            factor *= _growth(child)
    return factor


def _replacement(pattern: Any, length: int) -> float:
    """Characters that may come of one by a text of some length in place of each match."""
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str) and text:
        return max(1.0, length / len(text))
    return 1.0 + length  # an expression may match nothing, beside any character

"""Signatures of manifests and of the records of runs, so that nobody without the key changes a shared store unnoticed.

The seal of a manifest is a checksum, which anybody can compute: it finds damage, and not lies. Where the environment
variable ENTROPY_PROBE_SEAL_KEY has a key, manifests are also signed with it (an HMAC-SHA256 of the seal), and so are
records of runs. One that is not signed is refused. That is an error and never a reason to set an artifact aside: with
another key it is sound.
"""

import hmac
import os
from pathlib import Path
from typing import Any

from entropy_core.errors import StoreError

VARIABLE = "ENTROPY_PROBE_SEAL_KEY"
SIGNATURE = "signature"


class SignatureError(StoreError):
    """A manifest or a record is not signed with the key that is set, or is signed where none is."""


def key() -> bytes:
    """The key; empty where none is set."""
    return os.environ.get(VARIABLE, "").encode(errors="surrogateescape")


def signature(seal: str) -> dict[str, str]:
    """The entry that a document of that seal has beside it; nothing without a key."""
    return {SIGNATURE: hmac.digest(key(), seal.encode(), "sha256").hex()} if key() else {}


def require_signature(said: Any, seal: str, directory: Path) -> None:
    """Refuse a document that is not signed as it must be here.

    Args:
        said: its signature, if it has one.
        seal: what was signed: the SHA-256 of the rest of it, which the caller has computed or checked.
        directory: of the artifact or the run.

    Raises:
        SignatureError: as above.
    """
    ours = signature(seal).get(SIGNATURE)
    if said is None and ours is None:
        return
    if ours is None:
        raise SignatureError(
            f"{directory} is signed with a key, and {VARIABLE} is not set",
            cause="the store is shared by people who have a key",
            fix=f"ask them for it, and set {VARIABLE}",
        )
    if said is None:
        raise SignatureError(
            f"{directory} is not signed, and {VARIABLE} is set",
            cause="it was made without the key, or put there by somebody who does not have it",
            fix="delete the folder; if all that is in the store can be trusted, `entropy-probe store seal` signs it",
        )
    if not (isinstance(said, str) and said.isascii() and hmac.compare_digest(said, ours)):
        raise SignatureError(
            f"{directory} is signed with another key than {VARIABLE} has",
            cause="another key is set, or the folder was put there by somebody who does not have yours",
            fix=f"correct {VARIABLE}, or delete the folder",
        )

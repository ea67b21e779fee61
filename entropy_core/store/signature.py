"""Signatures of manifests, for a store that is shared: who does not know the key cannot change it unnoticed.

The seal of a manifest is a checksum, which anybody can compute: it finds damage, and not lies. Where the environment
variable ENTROPY_PROBE_SEAL_KEY has a key, manifests are also signed with it (an HMAC-SHA256 of the seal), and one that
is not is refused. That is an error and never a reason to set an artifact aside: with another key it is sound.
"""

import hmac
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_core.errors import StoreError

VARIABLE = "ENTROPY_PROBE_SEAL_KEY"
SIGNATURE = "signature"


class SignatureError(StoreError):
    """A manifest is not signed with the key that is set, or is signed where none is."""


def key() -> bytes:
    """The key; empty where none is set."""
    return os.environ.get(VARIABLE, "").encode(errors="surrogateescape")


def signature(seal: str) -> dict[str, str]:
    """What a manifest of that seal has to say beside it; nothing without a key."""
    return {SIGNATURE: hmac.digest(key(), seal.encode(), "sha256").hex()} if key() else {}


def require_signature(manifest: Mapping[str, Any], directory: Path) -> None:
    """Refuse a manifest that is not signed as it must be here.

    Args:
        manifest: whose seal is right.
        directory: of its artifact.

    Raises:
        SignatureError: as above.
    """
    said, ours = manifest.get(SIGNATURE), signature(manifest["seal"]).get(SIGNATURE)
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

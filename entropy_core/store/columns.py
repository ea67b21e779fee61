"""Per-token numbers on disk: a table of columns that lie flat, which says whose tokens they are. Needs no model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_core.errors import StoreError
from entropy_core.numerics import ragged

if TYPE_CHECKING:
    from entropy_core.store.artifact import Artifact, Writer

TOKENS = "tokens.safetensors"


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Columns of numbers, one for each response token of some sequences.

    Attributes:
        sequences_N: int64, who each sequence is: see `BatchedSequences.identities_N`.
        offsets_N1: int64 [N + 1]; sequence i has the tokens `offsets_N1[i]:offsets_N1[i + 1]`.
        columns: [K] by name.
    """

    sequences_N: Tensor
    offsets_N1: Tensor
    columns: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def require(self, sequences_N: Tensor, offsets_N1: Tensor) -> "TokenTable":
        """Make sure that the table is of these sequences, in this order.

        Args:
            sequences_N: int64.
            offsets_N1: int64 [N + 1].

        Returns:
            The table itself.

        Raises:
            StoreError: it is of others.
        """
        if not (torch.equal(self.sequences_N, sequences_N) and torch.equal(self.offsets_N1, offsets_N1)):
            raise StoreError(
                f"the columns {', '.join(self.columns)} of {len(self.sequences_N)} sequences are of others than the "
                f"{len(sequences_N)} that they are to be put beside",
                cause="artifacts of two batches were mixed, or the store was edited",
                fix="`entropy-probe store verify`, then run the sweep again",
            )
        return self

    def join(self, other: "TokenTable") -> "TokenTable":
        """The columns of both. Raises StoreError where the other is of other sequences."""
        other.require(self.sequences_N, self.offsets_N1)
        return TokenTable(self.sequences_N, self.offsets_N1, {**self.columns, **other.columns})

    def named(self, names: Mapping[str, str]) -> "TokenTable":
        """The same under other names, old → new."""
        columns = {names.get(name, name): column_K for name, column_K in self.columns.items()}
        return TokenTable(self.sequences_N, self.offsets_N1, columns)

    def first(self, sequences: int) -> "TokenTable":
        """The same of the first sequences."""
        offsets_N1 = self.offsets_N1[: sequences + 1]
        columns = {name: column_K[: int(offsets_N1[-1])] for name, column_K in self.columns.items()}
        return TokenTable(self.sequences_N[:sequences], offsets_N1, columns)

    def select(self, chosen_N: Tensor) -> "TokenTable":
        """The same of the chosen sequences, in the given order."""
        index_K = ragged.token_index(self.offsets_N1, chosen_N)
        offsets_N1 = ragged.offsets_from_lengths(ragged.lengths(self.offsets_N1)[chosen_N])
        columns = {name: column_K[index_K] for name, column_K in self.columns.items()}
        return TokenTable(self.sequences_N[chosen_N], offsets_N1, columns)

    def write(self, out: "Writer", name: str = TOKENS) -> None:
        """Persist the table in a safetensors file."""
        out.tensors({"sequences": self.sequences_N, "offsets": self.offsets_N1, **self.columns}, name)


def concatenate(tables: Sequence[TokenTable]) -> TokenTable:
    """Tables with the same columns, one after the other."""
    return TokenTable(
        torch.cat([table.sequences_N for table in tables]),
        ragged.concatenate([table.offsets_N1 for table in tables]),
        {name: torch.cat([table[name] for table in tables]) for name in tables[0].columns},
    )


def read_tokens(
    shards: "Sequence[Artifact]", *names: str, file: str = TOKENS, optional: Sequence[str] = ()
) -> TokenTable:
    """Read the table of some shards, one after the other.

    Args:
        shards: artifacts that a `TokenTable` was written to.
        names: of the columns that are wanted; may be none.
        file: which of their files.
        optional: names of columns that are read where the shards have them.

    Returns:
        The table.
    """
    found = [shard.tensors(file, ("sequences", "offsets", *names), optional) for shard in shards]
    tables = []
    for tensors in found:
        columns = {name: tensors[name] for name in (*names, *optional) if name in tensors}
        tables.append(TokenTable(tensors["sequences"], tensors["offsets"], columns))
    return concatenate(tables)


def as_numbers(rewards: Sequence[float | None]) -> Tensor:
    """Rewards as a table has them, float64 [N]; NaN for a response that no function rewarded."""
    return torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float64)

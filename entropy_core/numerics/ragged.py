"""Sums within sequences of different lengths, stored flat: sequence i is `values_K[offsets_N1[i]:offsets_N1[i + 1]]`.

Every function returns float64 (or int64) for any input dtype: a float32 sum over a long sequence is not accurate
enough for differences of entropies.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_sequences, _positions = WeakIdKeyDictionary(), WeakIdKeyDictionary()
"""Indices by their offsets, kept as long as these live: the statistics of a batch ask for each hundreds of times."""


def offsets_from_lengths(lengths_N: Tensor) -> Tensor:
    """Return the offsets [N + 1] of sequences of the given lengths [N], both int64."""
    return torch.cat([lengths_N.new_zeros(1), lengths_N.cumsum(0)])


def lengths(offsets_N1: Tensor) -> Tensor:
    """Return the length of each sequence, int64 [N]."""
    return offsets_N1.diff()


def sequence_index(offsets_N1: Tensor) -> Tensor:
    """Return the index of each token's sequence, int64 [K]; not to be changed in place."""
    found_K: Tensor | None = _sequences.get(offsets_N1)
    if found_K is None:
        found_K = _sequences[offsets_N1] = torch.repeat_interleave(lengths(offsets_N1))
    return found_K


def position_index(offsets_N1: Tensor) -> Tensor:
    """Return the position of each token within its sequence, counted from 0, int64 [K]; not to be changed in place."""
    found_K: Tensor | None = _positions.get(offsets_N1)
    if found_K is None:
        found_K = torch.arange(int(offsets_N1[-1])) - of_tokens(offsets_N1, offsets_N1)
        _positions[offsets_N1] = found_K
    return found_K


def of_tokens(values_N: Tensor, offsets_N1: Tensor) -> Tensor:
    """Return the value of its sequence for each token, [K]."""
    return values_N.index_select(0, sequence_index(offsets_N1))


def token_index(offsets_N1: Tensor, chosen_B: Tensor) -> Tensor:
    """Return the flat indices of the tokens of chosen sequences, one sequence after the other.

    Args:
        offsets_N1: int64 [N + 1].
        chosen_B: int64 [B], indices of sequences, in any order.

    Returns:
        int64 [K'], where K' is the number of chosen tokens: `values_K[index]` are the tokens of the chosen sequences.
    """
    offsets_B1 = offsets_from_lengths(lengths(offsets_N1)[chosen_B])
    shift_B = offsets_N1[:-1][chosen_B] - offsets_B1[:-1]
    return torch.arange(int(offsets_B1[-1])) + torch.repeat_interleave(shift_B, lengths(offsets_B1))


def sequence_sum(values_K: Tensor, offsets_N1: Tensor) -> Tensor:
    """Sum over each sequence, float64 [N]."""
    result_N = torch.zeros(len(offsets_N1) - 1, dtype=torch.float64)
    return result_N.index_add_(0, sequence_index(offsets_N1), values_K.double())


def position_sum(values_K: Tensor, offsets_N1: Tensor) -> Tensor:
    """Sum at each position over the sequences that reach it, float64 [T], where T is the length of the longest."""
    longest = int(lengths(offsets_N1).max()) if len(offsets_N1) > 1 else 0
    return torch.zeros(longest, dtype=torch.float64).index_add_(0, position_index(offsets_N1), values_K.double())


def padded_sum(a_T: Tensor, b_T: Tensor) -> Tensor:
    """Return a + b, with the shorter one (along the first dimension) padded with zeros."""
    short, long = sorted((a_T, b_T), key=len)
    total = long.clone()
    total[: len(short)] += short
    return total


def sum_before(values_K: Tensor, offsets_N1: Tensor) -> Tensor:
    """Return Σ_{j<k} values_j within the sequence for each token k, float64 [K]."""
    total_K = values_K.double().cumsum(0) - values_K.double()
    start_N = torch.cat([total_K, total_K.new_zeros(1)])[offsets_N1[:-1]]
    return total_K - of_tokens(start_N, offsets_N1)


def sum_after(values_K: Tensor, offsets_N1: Tensor) -> Tensor:
    """Return Σ_{j>k} values_j within the sequence for each token k, float64 [K]."""
    total_N = sequence_sum(values_K, offsets_N1)
    before_K = sum_before(values_K, offsets_N1)
    return of_tokens(total_N, offsets_N1) - before_K - values_K.double()


def concatenate(offsets: list[Tensor]) -> Tensor:
    """Return the offsets of several flat batches after concatenation."""
    return offsets_from_lengths(torch.cat([lengths(o) for o in offsets]))

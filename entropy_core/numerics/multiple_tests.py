"""p-values of several tests, adjusted so that a threshold holds for all of them together."""

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust by Holm's method: those at most α have a false one among them with probability at most α.

    Holds however the tests depend on each other. Source: Holm (1979), Scandinavian Journal of Statistics 6.

    Args:
        p_values: between 0 and 1.

    Returns:
        Adjusted p-values, in the same order.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjust by the method of Benjamini and Hochberg: of those at most α, at most a share α is false on average.

    Holds for independent and for positively dependent tests. Source: Benjamini and Hochberg (1995), JRSS B 57.

    Args:
        p_values: between 0 and 1.

    Returns:
        Adjusted p-values, in the same order.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__, reverse=True)
    adjusted, smallest = [1.0] * len(p_values), 1.0
    for beaten, i in enumerate(order):
        smallest = min(smallest, len(p_values) / (len(p_values) - beaten) * p_values[i])
        adjusted[i] = smallest
    return adjusted

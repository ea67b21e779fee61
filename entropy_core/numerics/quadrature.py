"""Gauss-Legendre nodes and weights on [0, 1], the fraction of the way from θ to θ + ηv."""

NODES = (0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5)
"""Nodes s_j; three nodes integrate ∂_vH exactly if it is a polynomial of degree at most five in η."""

WEIGHTS = (5 / 18, 8 / 18, 5 / 18)

_ROOT = 15**0.5
UP_TO_NODE = (
    (5 / 36, 2 / 9 - _ROOT / 15, 5 / 36 - _ROOT / 30),
    (5 / 36 + _ROOT / 24, 2 / 9, 5 / 36 - _ROOT / 24),
    (5 / 36 + _ROOT / 30, 2 / 9 + _ROOT / 15, 5 / 36),
)
"""Weights of the integrals from 0 to each node, exact for polynomials of degree two: the Gauss method of order six."""

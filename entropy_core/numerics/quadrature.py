"""Gauss-Legendre nodes and weights on [0, 1], the fraction of the way from θ to θ + ηv."""

NODES = (0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5)
"""Nodes s_j; three nodes integrate ∂_vH exactly if it is a polynomial of degree at most five in η."""

WEIGHTS = (5 / 18, 8 / 18, 5 / 18)

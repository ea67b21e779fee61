"""Where on the way from θ to θ + ηv derivatives are taken, as shares of it, and their weights."""

NODES = (0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5)
"""s_j: three of them integrate ∂_vH exactly while it is a polynomial of degree five in η."""

WEIGHTS = (5 / 18, 8 / 18, 5 / 18)

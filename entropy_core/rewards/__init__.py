"""Reward functions, by name or by the file that defines them."""

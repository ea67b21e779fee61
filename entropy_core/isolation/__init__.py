"""Functions of the user, run in a process of their own, within limits."""

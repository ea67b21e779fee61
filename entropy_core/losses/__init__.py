"""Loss functions, by name or by the file that defines them, and what a step's loss was taken of."""

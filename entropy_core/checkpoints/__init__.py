"""What a trainer left behind: which files, the model's parameters, and the optimizer's state by name."""

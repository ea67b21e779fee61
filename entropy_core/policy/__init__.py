"""The model as a function of its parameters: score it, move it, differentiate it."""

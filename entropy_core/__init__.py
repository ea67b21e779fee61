"""Predict what the next optimizer step does to a policy's entropy, with intervals, and measure it."""

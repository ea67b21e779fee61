"""Training runs to probe, made from nothing."""

"""Files that a result depends on: which ones count, what is in them, and that they are still the same."""

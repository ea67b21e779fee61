"""Whether this runs on this machine's device, right and fast: `python -m benchmarks.device`."""

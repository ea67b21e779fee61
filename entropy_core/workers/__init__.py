"""Long-lived processes that run the stages of a sweep, each on a device of its own."""

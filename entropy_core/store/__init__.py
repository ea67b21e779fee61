"""What was computed, under a key that says what made it."""

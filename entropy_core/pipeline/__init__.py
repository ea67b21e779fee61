"""A sweep from its request to its record. Knows every stage; no stage knows it."""

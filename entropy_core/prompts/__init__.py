"""Prompt pools from files, known datasets or generators, as text and as tokens."""

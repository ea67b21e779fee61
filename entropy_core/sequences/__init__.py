"""Sequences: sampled, scored, differentiated, and kept on disk."""

"""Sample, score and differentiate sequences, and store them on disk."""

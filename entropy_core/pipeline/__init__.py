"""Run a sweep from its request to its record. The pipeline imports the stages; no stage imports the pipeline."""

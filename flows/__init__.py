"""The flows: what Prefect runs, serves and shows."""

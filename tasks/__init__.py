"""The stages as Prefect tasks."""

"""The stages as Prefect tasks."""

import os

os.environ.setdefault("DO_NOT_TRACK", "1")  # read by Prefect when it is imported

"""The flows: what Prefect runs, serves and shows."""

import os

os.environ.setdefault("DO_NOT_TRACK", "1")  # read by Prefect when it is imported

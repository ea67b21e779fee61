"""The report of a sweep: its page, sections and figures."""

"""What a user asks for: its types and bounds, reading it, its reference pages, and the configurations before."""

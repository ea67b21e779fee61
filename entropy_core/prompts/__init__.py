"""Pools of prompts: from files, from known datasets, or made by a program; as text and as tokens."""

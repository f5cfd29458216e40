"""Checkpoints of every layout: opened, identified, and written in another layout."""

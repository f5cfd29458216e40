"""Looks inside graphs: which part differs from the reference, and how large its values grow."""

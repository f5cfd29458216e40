"""Seeded fuzzing: for each kind of input, a number is turned into odd files or arguments and given to cascadekit.

Every call must succeed or be refused in words, in bounded time and memory. All calls run in a process of their own, so
that whatever ends it is a finding with a seed. `python -m tests.fuzz KIND SEED` runs one input alone, and shows it.
"""

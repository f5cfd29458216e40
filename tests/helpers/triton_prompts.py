"""The requests of the tests to a Triton server; plain values, for both environments."""

QUICK = {"width": 64, "height": 96, "prior_steps": 3, "decoder_steps": 2}
PROMPTS = ("a red circle", "a fox, flat style", "a blue star", "ein Wal, glänzend")

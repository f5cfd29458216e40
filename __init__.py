"""cascadekit: convert, export, run and verify Stable Cascade."""

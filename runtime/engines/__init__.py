"""What executes a stage: one file per engine behind one protocol."""

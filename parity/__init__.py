"""Numbers that say how far an engine is from the reference."""

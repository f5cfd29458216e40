"""LoRA files of Stable Cascade: read in every known format, converted between them, merged into checkpoints."""

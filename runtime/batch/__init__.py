"""Many images from a file of prompts."""

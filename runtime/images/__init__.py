"""Reads the pictures and masks that users give, and writes the images that the cascade generates."""

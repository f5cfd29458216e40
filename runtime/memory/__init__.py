"""Predicts the memory that generating takes, and decides which stages stay loaded."""

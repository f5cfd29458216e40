"""Trains the small Stable Cascade that cascadekit ships, from icons of npm packages and shapes of its own."""

"""How much memory a generation takes, and which stages stay loaded."""

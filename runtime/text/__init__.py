"""From prompts to what the text encoder makes of them."""

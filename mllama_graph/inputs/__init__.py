"""From what a person writes to token ids and image tiles, and back to text."""

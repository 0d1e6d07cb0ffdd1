"""Converts prompts and images to token ids and image tiles, and ids back to text."""

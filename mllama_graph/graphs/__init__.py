"""Compiled graphs: what one is, how it is compiled, stored, loaded and chosen."""

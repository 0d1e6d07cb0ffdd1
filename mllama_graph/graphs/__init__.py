"""Compiled graphs: specification, compilation, storage, loading and selection."""

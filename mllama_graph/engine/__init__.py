"""Serves requests: the scheduler, the ranks and their devices."""

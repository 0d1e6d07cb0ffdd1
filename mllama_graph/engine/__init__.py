"""Requests in, tokens out: the scheduler, the ranks and their devices."""

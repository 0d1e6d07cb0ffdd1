"""Measurements: sessions, sweeps, plots, machine limits, other engines."""

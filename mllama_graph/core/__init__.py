"""Foundations of all other packages: configuration, errors, host properties and reporting. Imports no torch."""

"""What every other room may use: the configuration, errors, the machine, what a person sees. Imports no torch."""

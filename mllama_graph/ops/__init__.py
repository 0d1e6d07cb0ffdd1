"""The seam between the model and a device: contract.py says what an op does, the other files do it."""

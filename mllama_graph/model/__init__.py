"""The model as functions over trees: tree.py (weights and inputs), text.py, vision.py, sample.py."""

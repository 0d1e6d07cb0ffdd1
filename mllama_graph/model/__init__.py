"""The model as functions of weight trees (tree.py) and inputs (inputs.py): text.py, vision.py, sample.py."""

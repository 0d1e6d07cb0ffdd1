"""Implementations of the operations that model/ops.py defines, one file per kind of device."""

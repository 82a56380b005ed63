"""Measure jacobian_ops against native autograd: ``python -m bench --help``."""

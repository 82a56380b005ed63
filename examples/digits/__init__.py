"""Train a small transformer on handwritten digits, natively and on jacobian_ops, and compare."""

"""Examples of jacobian_ops."""

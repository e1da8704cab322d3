"""The closed form of the operators in pure PyTorch, for any device: docs/algebra.md derives it."""

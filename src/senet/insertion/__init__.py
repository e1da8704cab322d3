"""SE into any CNN, and out again."""

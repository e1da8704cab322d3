"""Train networks: recipes, the loop, checkpoints."""

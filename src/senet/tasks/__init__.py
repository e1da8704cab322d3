"""What a network's outputs mean: targets, loss, metrics, and how a prediction is told."""

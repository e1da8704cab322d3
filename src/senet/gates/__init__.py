"""What gates do over a data set; gates that are constant folded away."""

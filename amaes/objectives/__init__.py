"""A batch to inputs, targets and the terms of the loss."""

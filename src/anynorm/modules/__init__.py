"""What is remembered: the norms as modules."""

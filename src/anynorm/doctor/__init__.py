"""What is wrong with the norms of a model, and the way out: `diagnose`, its checks, and `Monitor`."""

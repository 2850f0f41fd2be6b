"""Population statistics of the batch norms of a model."""

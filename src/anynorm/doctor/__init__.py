"""The doctor: what is wrong with the norms of a model."""

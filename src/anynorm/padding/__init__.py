"""What a mask is behind each layer of a model, and the context that hands masks to the layers inside."""

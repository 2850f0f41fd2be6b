"""Gradient accumulation whose batch norms see the whole batch."""

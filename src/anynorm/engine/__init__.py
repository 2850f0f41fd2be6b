"""Which path serves a call, how gradients flow, and the numbers: compiled, or in torch operations."""

"""Batch norms become part of the convolutions and linear layers beside them.

`norms.py` says what a norm does to a channel, `graphs.py` records how the model calls its layers, `passing.py` knows
what changes nothing on the way, `channels.py` follows a channel through reshaping, `search.py` finds the places,
`layers.py` has the algebra, and `fold.py` is the operation.
"""

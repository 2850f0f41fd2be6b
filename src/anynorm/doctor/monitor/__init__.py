"""What the norms of a model do while it trains, measured every few steps and written to a file."""

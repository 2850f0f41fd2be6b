"""`anynorm try`: what would change on this model, found out without any data."""

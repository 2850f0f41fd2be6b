"""A model on data from elsewhere: statistics at test time."""

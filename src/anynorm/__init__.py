"""anynorm: batch normalization and its family as one formula."""

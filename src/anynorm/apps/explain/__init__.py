"""`anynorm list` and `anynorm explain`: the family and its formula, shown with numbers the library computes."""

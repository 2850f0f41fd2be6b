"""`anynorm explain`: the family and its formula, shown with numbers that the library computes."""

"""`anynorm compare`: a network trained with each norm, judged over seeds, and reported."""

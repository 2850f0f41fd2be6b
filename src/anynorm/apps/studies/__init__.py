"""Studies: networks trained with each norm, judged over seeds, and reported."""

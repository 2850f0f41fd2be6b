"""`anynorm speed`: a dozen layers and two whole training steps, on this machine, in the time that it says."""

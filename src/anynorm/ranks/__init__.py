"""What the ranks of a process group say to each other."""

"""What a name on the command line stands for: a model, an input that it accepts, and its norms."""

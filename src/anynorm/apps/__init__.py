"""The command line and what it runs. They use the library as any user would, and nothing of it needs them."""

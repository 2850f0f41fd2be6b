"""How the ranks of a process group exchange statistics, and what they raise where one of them differs or is missing."""

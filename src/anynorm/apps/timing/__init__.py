"""Calls and training steps timed by turns, so that a busy machine disturbs all of them alike."""

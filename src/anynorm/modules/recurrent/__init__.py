"""Recurrent layers with norms inside the recurrence."""

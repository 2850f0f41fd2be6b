"""Callbacks for trainers; each file imports the package it is for, and nothing here imports them."""

"""Frozen vectors, and what makes them."""

"""Importance of units from weights and one forward pass."""

"""Turbo models: their published settings, and what is wrong with other ones."""

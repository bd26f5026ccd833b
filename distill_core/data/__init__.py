"""Cached latents and what they are made from."""

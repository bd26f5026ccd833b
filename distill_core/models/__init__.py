"""Backbones: the views of them that train and sample, and where they come from."""

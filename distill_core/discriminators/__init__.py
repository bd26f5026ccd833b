"""Discriminators, one file each: on a frozen teacher's features, on decoded images, and a trainable network."""

"""The trainer nodes, one file a method."""

"""The loop, a run in its folder, and what watches over it."""

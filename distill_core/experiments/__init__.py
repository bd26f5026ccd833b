"""The demo, the comparison of methods, and how the mini model is made."""

"""The commands of ``python -m distill_core``."""

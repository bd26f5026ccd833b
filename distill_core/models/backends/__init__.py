"""Adapters from model libraries to `distill_core.denoiser.Backend`."""

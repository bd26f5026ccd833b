"""Adapters from model libraries to `models.denoiser.Backend`."""

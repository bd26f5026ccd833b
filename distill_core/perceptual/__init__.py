"""E-LatentLPIPS: a perceptual distance between latents, its weights, calibration, and the Latent Perceptual Loss."""

from .metric import ELatentLPIPS
from .weights import load_metric

__all__ = ["ELatentLPIPS", "load_metric"]

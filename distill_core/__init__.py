"""Few-step sampling and adversarial distillation of diffusion models.

Read the folders in this order, each builds on those before it: diffusion, models, data, presets, perceptual,
discriminators, methods, training, evaluation, experiments, cli (docs/design.md).
"""

from .diffusion.samplers import SAMPLERS, sample
from .methods.registry import METHODS
from .models.denoiser import Cond, Denoiser, Guided
from .presets.table import presets
from .training.loop import Run, train
from .training.loop_config import TrainConfig
from .training.run import RunConfig, StudentConfig, new_run, train_to_end

__version__ = "0.3.0"

__all__ = [
    "METHODS",
    "SAMPLERS",
    "Cond",
    "Denoiser",
    "Guided",
    "Run",
    "RunConfig",
    "StudentConfig",
    "TrainConfig",
    "new_run",
    "presets",
    "sample",
    "train",
    "train_to_end",
]

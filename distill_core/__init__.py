"""Few-step sampling and adversarial distillation of diffusion models, independent of any user interface."""

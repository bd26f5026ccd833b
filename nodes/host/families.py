"""`architectures` under its former names, until backend, lora_keys, conditioning and datasets import the new ones."""

from .architectures import Architecture as Family
from .architectures import architecture_of as training_family

__all__ = ["Family", "training_family"]

"""What ranks pictures of a prompt: a function of images and prompts, higher is better.

    def score(images, prompts): ...   # [B, 3, H, W] in [-1, 1], B texts -> B numbers

The mini model has one of its own; for other models it is the user's, in a Python file.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import first_line
from . import mini

Scorer = Callable[[Tensor, Sequence[str]], Tensor]
CLASSIFIER = "classifier"  # the mini model's


@lru_cache(maxsize=1)
def _classifier() -> mini.FeatureClassifier:
    return mini.load_classifier("pixel")[0]


@torch.no_grad()
def class_score(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Log-probability [B] that the mini model's classifier of images gives the class that a prompt names, float64."""
    logits = _classifier()(mini.classifier_input("pixel", images.float().cpu()))
    classes = torch.tensor([mini.CLASS_NAMES.index(prompt) for prompt in prompts])
    return logits.double().log_softmax(1)[torch.arange(len(classes)), classes]


def open_scorer(name: str) -> Scorer:
    """The scorer of that name, or the function ``score`` of a Python file. Raises ValueError where there is none."""
    if name == CLASSIFIER:
        return class_score
    if not Path(name).is_file():
        raise ValueError(
            f"there is no scorer {name}: give the path of a Python file with a function score(images, prompts), or "
            f'"{CLASSIFIER}" for the mini model'
        )
    try:
        function = runpy.run_path(name).get("score")
    except Exception as error:  # whatever the user's file raises
        raise ValueError(f"the scorer {name} cannot be opened: {first_line(error)}") from error
    if not callable(function):
        raise ValueError(f"the scorer {name} has no function score(images, prompts)")
    return function


def scored(scorer: Scorer, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Its scores [B], float64 on the CPU. Raises ValueError for another number of them, or one that is not finite."""
    scores = torch.as_tensor(scorer(images, prompts)).detach().double().cpu()
    if scores.shape != (len(prompts),):
        raise ValueError(
            f"the scorer gave scores of shape {list(scores.shape)} for {len(prompts)} images: one for each"
        )
    if not scores.isfinite().all():
        raise ValueError(f"the scorer gave {scores.tolist()} for {list(prompts)}: scores are finite numbers")
    return scores

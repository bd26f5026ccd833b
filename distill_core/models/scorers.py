"""What ranks pictures of a prompt: a function of images and prompts, higher is better.

    def score(images, prompts): ...   # [B, 3, H, W] in [-1, 1], B texts -> B numbers

The shipped models have one of their own; for other models it is the user's, in a Python file.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import first_line
from . import mini, scenes
from .shipped import FeatureClassifier

Scorer = Callable[[Tensor, Sequence[str]], Tensor]
CLASSIFIER = "classifier"  # of a shipped model


@lru_cache(maxsize=1)
def _of_mini() -> FeatureClassifier:
    return mini.load_classifier("pixel")[0]


@lru_cache(maxsize=1)
def _of_scenes() -> FeatureClassifier:
    return scenes.load_classifier("pixel")[0]


@torch.no_grad()
def class_score(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Log-probability [B] that the mini model's classifier of images gives the class that a prompt names, float64."""
    logits = _of_mini()(mini.classifier_input("pixel", images.float().cpu()))
    classes = torch.tensor([mini.CLASS_NAMES.index(prompt) for prompt in prompts])
    return logits.double().log_softmax(1)[torch.arange(len(classes)), classes]


@torch.no_grad()
def words_score(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Sum [B] of the log-probabilities that the scenes model's classifier of images gives the words of a prompt."""
    groups = scenes.by_group(_of_scenes()(images.float().cpu()).double())
    scores = torch.cat([logits.log_softmax(1) for logits in groups.values()], dim=1)  # [B, words]
    asked = torch.zeros(len(prompts), 1 + len(scenes.WORDS), dtype=scores.dtype)
    asked.scatter_(1, scenes.tokenize(prompts), 1.0)
    return (scores * asked[:, 1:]).sum(1)


CLASSIFIERS: dict[str, Scorer] = {"mini": class_score, "scenes": words_score}  # by [model] path


def open_scorer(name: str, model: str = "") -> Scorer:
    """The scorer of that name, or the function ``score`` of a Python file.  model: whose samples it scores, by the name
    of a shipped one.

    Raises ValueError where there is none.
    """
    if name == CLASSIFIER and model in CLASSIFIERS:
        return CLASSIFIERS[model]
    if name == CLASSIFIER:
        raise ValueError(
            f'[preference] scorer = "{CLASSIFIER}" is for the shipped models alone: give the path of a Python file '
            "with a function score(images, prompts)"
        )
    if not Path(name).is_file():
        raise ValueError(
            f"there is no scorer {name}: give the path of a Python file with a function score(images, prompts), or "
            f'"{CLASSIFIER}" for a shipped model'
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

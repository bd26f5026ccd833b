"""The launcher's cures for packages without their compiled parts."""

import sys
from types import SimpleNamespace

import launch
import pytest
import torch


@pytest.mark.case(
    "memory 5.8", "the test server starts where another package has already declared torchvision's operators"
)
def test_operators_that_are_there_are_not_declared_again(monkeypatch):
    extension = SimpleNamespace(_has_ops=lambda: False)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(extension=extension))
    monkeypatch.setitem(sys.modules, "torchvision.extension", extension)
    for _ in range(2):
        launch.define_missing_vision_ops()
    assert hasattr(torch.ops.torchvision, "nms") and hasattr(torch.ops.torchvision, "qnms")

"""What all nodes share."""

from __future__ import annotations

CATEGORY = "turbo distill"
OF_PRESET = "of the preset"
SEED_MAX = 0xFFFFFFFFFFFFFFFF

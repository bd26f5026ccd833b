"""Draw icon.png, a lightning bolt coming out of noise in four steps: python tools/make_icon.py (needs Pillow, numpy)"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE, BOLT = 400, [(230, 40), (110, 225), (195, 225), (165, 360), (295, 165), (207, 165)]


def main() -> None:
    clean = Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(clean).polygon(BOLT, fill=255)
    x0 = np.asarray(clean, dtype=float) / 255
    blocks = np.random.default_rng(0).random((SIDE // 10, SIDE // 10)).repeat(10, 0).repeat(10, 1)
    sigma = np.select([np.arange(SIDE) < edge for edge in (100, 200, 300)], [0.75, 0.5, 0.25], 0.0)
    x = ((1 - sigma) * x0 + sigma * blocks)[..., None]
    picture = (1 - x) * np.array([24, 28, 48]) + x * np.array([255, 214, 74])
    mask = Image.new("L", (SIDE, SIDE), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, SIDE - 1, SIDE - 1), 72, fill=255)
    icon = Image.fromarray(picture.astype(np.uint8))
    icon.putalpha(mask)
    icon.save(Path(__file__).resolve().parents[1] / "icon.png", optimize=True)


if __name__ == "__main__":
    main()

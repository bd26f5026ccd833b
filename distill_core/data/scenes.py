"""Pictures without end and without a licence: one textured object on a textured ground, drawn by a program.

A scene is four words, "striped yellow ring on cobbles", and a row of uniform numbers that says everything else: place,
size and turn of the object, light, tones, the stones or ripples of the ground. The same row with one word changed is
the same scene edited, and the object's mask is known exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..diffusion.noise import item_generator
from ..models.scenes import GROUPS, SIZE

STONES = 24  # at most, of the cobbles in a square of side `TILE`
TILE = 2.4
DRAWS = 24 + 4 * STONES  # uniform numbers of a scene

Field = tuple[Tensor, Tensor]  # coordinates x and y, each [B, h, w]: -1 to 1 over `SIZE` pixels around the middle
PIXEL = 2 / SIZE

COLOURS = {  # hue, saturation, value
    "red": (0.99, 0.85, 0.85),
    "yellow": (0.14, 0.9, 0.95),
    "green": (0.36, 0.8, 0.7),
    "blue": (0.62, 0.8, 0.9),
    "white": (0.1, 0.05, 0.95),
}


def draw_rows(seed: int, items: Sequence[int]) -> Tensor:
    """The uniform numbers [B, DRAWS] of the scenes ``items``; each comes from its own generator."""
    return torch.stack([torch.rand(DRAWS, generator=item_generator(seed, item)) for item in items])


def draw_words(seed: int, items: Sequence[int], allowed: Tensor | None = None) -> Tensor:
    """Words [B, 4] of the scenes, an index into each of `GROUPS`, all as likely.

    allowed: combinations [K, 4] to draw from; None for all.
    """
    table = torch.cartesian_prod(*(torch.arange(len(g)) for g in GROUPS.values())) if allowed is None else allowed
    picks = [torch.randint(len(table), (), generator=item_generator(seed, item, 1)) for item in items]
    return table[torch.stack(picks)]


def draw_edits(seed: int, items: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Words [B, 4] before and after an edit: one of the four, any with the same chance, becomes another of its group.

    Rendered with one row of numbers, the two are the same scene but for that word.
    """
    before = draw_words(seed, items)
    after = before.clone()
    for row, item in zip(after, items, strict=True):
        generator = item_generator(seed, item, 2)
        group = int(torch.randint(len(GROUPS), (), generator=generator))
        count = len([*GROUPS.values()][group])
        row[group] = (row[group] + torch.randint(1, count, (), generator=generator)) % count
    return before, after


def render(words: Tensor, rows: Tensor, size: tuple[int, int] = (SIZE, SIZE)) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, h, w] in [-1, 1] and the objects' masks [B, 1, h, w] in [0, 1].

    words [B, 4] as `draw_words` gives them, rows [B, DRAWS] as `draw_rows`.  size: (w, h) in pixels; whatever it is, a
    scene's middle and its scale are the same, so a wider picture shows more of the ground. Raises ValueError for other
    shapes, words that do not exist and sides below `SIZE`.
    """
    sizes = [len(group) for group in GROUPS.values()]
    if words.ndim != 2 or words.shape[1] != len(sizes) or rows.shape != (len(words), DRAWS):
        raise ValueError(
            f"words must be [B, {len(sizes)}] and rows [B, {DRAWS}], not {[*words.shape]} and {[*rows.shape]}"
        )
    if (words < 0).any() or (words >= torch.tensor(sizes)).any():
        raise ValueError(f"an index of a word is out of range: the groups have {sizes} words")
    if min(size) < SIZE:
        raise ValueError(
            f"a scene has sides of at least {SIZE} pixels, which its object needs, not {size[0]}x{size[1]}"
        )
    u = rows.view(*rows.shape, 1, 1)  # [B, DRAWS, 1, 1]
    lines = [(torch.arange(side) + 0.5) * PIXEL - side / SIZE for side in reversed(size)]
    y, x = (v.expand(len(words), *reversed(size)) for v in torch.meshgrid(*lines, indexing="ij"))
    angle = 2 * math.pi * u[:, 0]
    light = (angle.cos(), angle.sin())

    backdrop = choose(words[:, 3], [ground(x, y, u, light) for ground in (cobbles, waves)])  # [B, 3, h, w]
    centre = (0.24 * (u[:, 1] - 0.5), 0.24 * (u[:, 2] - 0.5))
    radius = 0.55 + 0.13 * u[:, 3]
    turn = 0.35 * (u[:, 4] - 0.5)  # up to 10 degrees to either side

    def distance(dx: Tensor | float = 0.0, dy: Tensor | float = 0.0) -> Tensor:
        field = rotated(x - centre[0] - dx, y - centre[1] - dy, turn)
        return choose(words[:, 2], [shape(field, radius) for shape in (ring, triangle, star, cross)])

    edge = distance()  # [B, h, w], negative inside
    mask = (0.5 - edge / PIXEL).clamp(0, 1)[:, None]
    shadow = (0.5 - distance(0.09 * light[0], 0.09 * light[1]) / (4 * PIXEL)).clamp(0, 1)[:, None]
    backdrop = backdrop * (1 - 0.5 * shadow)

    pattern = choose(words[:, 0], [tone(x, y, u) for tone in (plain, stripes, checks)])[:, None]
    base = hsv(*(table[words[:, 1], None, None] for table in torch.tensor([*COLOURS.values()]).T))
    second = 0.22 * base + 0.02
    slope = ((x - centre[0]) * light[0] + (y - centre[1]) * light[1]) / radius
    shading = (1 - 0.22 * slope).clamp(0.6, 1.3) * (1 - 0.45 * (1 + edge / (2 * PIXEL)).clamp(0, 1))
    surface = (pattern * base + (1 - pattern) * second) * shading[:, None]
    picture = mask * surface + (1 - mask) * backdrop
    return 2 * picture.clamp(0, 1) - 1, mask


def choose(index: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Row i of ``parts[index[i]]``."""
    return torch.stack(list(parts), 1)[torch.arange(len(index)), index]


def rotated(x: Tensor, y: Tensor, angle: Tensor) -> Field:
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Colours [B, 3, ...] in [0, 1] of hues (one turn is 1), saturations and values of one shape [B, ...]."""
    shifts = torch.tensor([0.0, 2 / 3, 1 / 3]).view(1, 3, *[1] * (hue.ndim - 1))
    ramp = (((hue[:, None] + shifts) % 1 * 6 - 3).abs() - 1).clamp(0, 1)
    return value[:, None] * (1 + saturation[:, None] * (ramp - 1))


# Shapes: signed distance [B, h, w], negative inside, of a shape of that radius [B, 1, 1].


def ring(field: Field, radius: Tensor) -> Tensor:
    return (torch.hypot(*field) - 0.72 * radius).abs() - 0.26 * radius


def triangle(field: Field, radius: Tensor) -> Tensor:
    x, y = field
    sides = [x * math.cos(a) + y * math.sin(a) for a in (math.pi / 2, 7 * math.pi / 6, 11 * math.pi / 6)]
    return torch.stack(sides).amax(0) - 0.55 * radius


def star(field: Field, radius: Tensor) -> Tensor:
    """Five points: the angle is folded into half a point, whose outline is one straight edge."""
    x, y = field
    half = math.pi / 5
    folded = (torch.remainder(torch.atan2(y, x), 2 * half) - half).abs()  # 0 between two points, half at one
    r, tip, notch = torch.hypot(x, y), 1.1, 0.45
    px, py = r * torch.cos(half - folded), r * torch.sin(half - folded)  # the point lies on the axis
    nx, ny = notch * math.sin(half), tip - notch * math.cos(half)  # normal of the edge from the tip to the notch
    return ((px - tip * radius) * nx + py * ny) / math.hypot(nx, ny)


def cross(field: Field, radius: Tensor) -> Tensor:
    x, y = field[0].abs(), field[1].abs()
    bars = [torch.maximum(a - 0.95 * radius, b - 0.32 * radius) for a, b in ((x, y), (y, x))]
    return torch.minimum(*bars)


# Textures of an object: 1 for its colour, 0 for its dark tone, [B, h, w].


def waviness(t: Tensor, period: Tensor) -> Tensor:
    """A square wave of that period (in the units of t) whose edges are a pixel wide, 0 to 1."""
    return (0.5 + torch.sin(2 * math.pi * t / period) * period / (2 * math.pi * PIXEL)).clamp(0, 1)


def plain(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    return torch.ones_like(x)


def texture_field(x: Tensor, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turned and shifted coordinates, and a period of 7 to 10 pixels."""
    a, b = rotated(x, y, 2 * math.pi * u[:, 5])
    return a + u[:, 6], b + u[:, 7], (7 + 3 * u[:, 8]) * PIXEL


def stripes(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    a, _, period = texture_field(x, y, u)
    return waviness(a, period)


def checks(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    a, b, period = texture_field(x, y, u)
    a, b = 2 * waviness(a, 1.4 * period) - 1, 2 * waviness(b, 1.4 * period) - 1
    return 0.5 + 0.5 * a * b


# Grounds: pictures [B, 3, h, w] in [0, 1]; the tones of one share a hue.


def cobbles(x: Tensor, y: Tensor, u: Tensor, light: Field) -> Tensor:
    """Cells around 12 to `STONES` points, domed towards the light, with dark joints (Worley 1996).

    The points fill a square of side `TILE`; where a picture is larger, the same ones come again beside it.
    """
    beside = torch.cartesian_prod(tiles(x), tiles(y)).repeat_interleave(STONES, 0).T[..., None, None]  # [2, N, 1, 1]
    stones = u[:, 24:].unflatten(1, (STONES, 4)).repeat(1, beside.shape[1] // STONES, 1, 1, 1)  # [B, N, 4, 1, 1]
    count = 12 + ((STONES - 11) * u[:, 10]).floor()  # [B, 1, 1]
    dx = x[:, None] - (TILE * stones[:, :, 0] - TILE / 2 + beside[0])
    dy = y[:, None] - (TILE * stones[:, :, 1] - TILE / 2 + beside[1])
    absent = torch.arange(beside.shape[1]).view(1, -1, 1, 1) % STONES >= count[:, None]
    distance = torch.hypot(dx, dy).masked_fill(absent, 9.0)  # [B, N, h, w]
    two, index = distance.topk(2, dim=1, largest=False)
    nearest = index[:, :1]
    joint = ((two[:, 1] - two[:, 0]) / (3.5 * PIXEL)).clamp(0, 1)
    slope = (dx.gather(1, nearest) * light[0][:, None] + dy.gather(1, nearest) * light[1][:, None])[:, 0]
    hue_of, value_of = (stones[:, :, k, 0, 0].gather(1, nearest.flatten(1)).view_as(x) for k in (2, 3))
    hue = (u[:, 9] + 0.16 * (hue_of - 0.5)) % 1
    value = (0.45 + 0.4 * (value_of - 0.5) + 0.1 * u[:, 11]) * (1 - 0.8 * slope).clamp(0.5, 1.5)
    return hsv(hue, 0.3 + 0.15 * hue_of, value.clamp(0, 1)) * (0.12 + 0.88 * joint[:, None])


def tiles(line: Tensor) -> Tensor:
    """How far along an axis of these coordinates the stones' square is repeated, so that it covers them."""
    count = max(0, math.ceil((line.abs().max().item() - TILE / 2) / TILE))
    return TILE * torch.arange(-count, count + 1)


def waves(x: Tensor, y: Tensor, u: Tensor, light: Field) -> Tensor:
    """Ripples of 6 to 10 pixels, bent by two slow sines."""
    a, b = rotated(x, y, 2 * math.pi * u[:, 12])
    bend = 0.12 * torch.sin(3 * b + 2 * math.pi * u[:, 13]) + 0.07 * torch.sin(5 * a + 4 * b + 2 * math.pi * u[:, 14])
    period = (6 + 4 * u[:, 15]) * PIXEL
    crest = 0.5 + 0.5 * torch.sin(2 * math.pi * ((a + bend) / period + u[:, 16]))
    hue = (u[:, 9] + 0.1 * (crest - 0.5)) % 1
    return hsv(hue, torch.full_like(hue, 0.35), (0.25 + 0.2 * u[:, 11]) + 0.38 * crest)

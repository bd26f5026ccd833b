"""What the comparison says of the papers' claims: each claim is a list of orderings between entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"
SEEDS = 3  # fewer decide nothing


@dataclass(frozen=True)
class Order:
    """``better`` beats ``worse``; each is (entry, steps).

    metric: of the scores.  higher: whether larger is better.  ties_allowed: the claim is only that ``worse`` is not
    better.
    """

    better: tuple[str, str]
    worse: tuple[str, str]
    metric: str = "fd"
    higher: bool = False
    ties_allowed: bool = False

    def values(self, results: dict[str, list[dict]]) -> list[list[float]]:
        """The scores of both, a value a seed; an entry that was not run has none."""
        return [
            [
                run["scores"][steps][self.metric]
                for run in results.get(entry, [])
                if self.metric in run["scores"].get(steps, {})
            ]
            for entry, steps in (self.better, self.worse)
        ]

    def verdict(self, results: dict[str, list[dict]]) -> str:
        """Decided only where the ranges over the seeds do not touch."""
        better, worse = self.values(results)
        if min(len(better), len(worse)) < SEEDS:
            return OPEN
        if self.higher:
            better, worse = [-v for v in better], [-v for v in worse]
        if min(better) > max(worse):
            return FAILS
        return HOLDS if max(better) < min(worse) or self.ties_allowed else OPEN


@dataclass(frozen=True)
class Claim:
    """One claim: its number in the project's list, its words and source, and the orderings it comes to here."""

    number: int
    text: str
    orders: Sequence[Order]


def steps_of(better: str, worse: str, *steps: str, **more) -> list[Order]:
    return [Order((better, s), (worse, s), **more) for s in steps]


ADV, DISTIL = "ADD, adversarial only", "ADD, distillation only"
HUBER, LADD, D2GAN = "pairs only", "LADD", "Diffusion2GAN"
LOW, HIGH = "LADD, m = -1", "LADD, m = 1"

CLAIMS = [
    Claim(
        1,
        "A pretrained start is far better than a random one (ADD table 1c)",
        [*steps_of(HUBER, "pairs only, random start", "1")],
    ),
    Claim(
        2,
        "Distillation alone fails; the adversarial term alone is nearly as good as both (ADD table 1d)",
        [
            *steps_of(ADV, DISTIL, "1", "2", "4"),
            *steps_of("ADD", DISTIL, "1"),
            *steps_of("ADD", ADV, "1", ties_allowed=True),
        ],
    ),
    Claim(
        4,
        "ADD gains from 1 to 4 steps, and 4 steps beat the teacher (ADD figures 5-7)",
        [Order(("ADD", "2"), ("ADD", "1")), Order(("ADD", "4"), ("ADD", "2")), Order(("ADD", "4"), ("teacher", "25"))],
    ),
    Claim(
        5,
        "One teacher step is enough for the distillation term (ADD table 1f)",
        [*steps_of("ADD", "ADD, 4 teacher steps", "1", "4", ties_allowed=True)],
    ),
    Claim(
        7,
        "LADD is better than ADD and than consistency distillation (LADD section 4.3)",
        [*steps_of(LADD, "ADD", "1", "2", "4"), *steps_of(LADD, "consistency only", "1", "2", "4")],
    ),
    Claim(
        8,
        "Synthetic data aligns better than real; on it the distillation term gains nothing (LADD section 4.2)",
        [
            *steps_of(LADD, "LADD, real latents", "1", "4", metric="accuracy", higher=True),
            *steps_of(ADV, "ADD", "1", "4", ties_allowed=True),
        ],
    ),
    Claim(
        9,
        "High re-noising gives layout, low texture (LADD section 4.1)",
        [*steps_of(HIGH, LOW, "1", metric="accuracy", higher=True), *steps_of(LOW, HIGH, "1", metric="detail_error")],
    ),
    Claim(
        14,
        "E-LatentLPIPS is better than Huber, Huber better than MSE (Diffusion2GAN table 1)",
        [*steps_of("pairs only, E-LatentLPIPS", HUBER, "1"), *steps_of(HUBER, "pairs only, mse", "1")],
    ),
    Claim(
        16,
        "The discriminator, its noise input, R1, scales and mix-and-match help (Diffusion2GAN table 1)",
        [
            *steps_of(D2GAN, HUBER, "1"),
            *(
                order
                for part in ("noise input", "R1", "multi-scale", "mix-and-match")
                for order in steps_of(D2GAN, f"{D2GAN}, no {part}", "1")
            ),
        ],
    ),
    Claim(
        17,
        "A paired student stays nearer to the teacher's own map (Diffusion2GAN section 4)",
        [Order((paired, "1"), (other, "1"), "drift") for paired in (HUBER, D2GAN) for other in (LADD, ADV)],
    ),
]


def median_and_range(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median and, of several values, the smallest and largest."""
    text = form.format(median(values))
    return text if len(values) == 1 else f"{text} ({form.format(min(values))}-{form.format(max(values))})"


def describe(order: Order, results: dict[str, list[dict]]) -> str:
    """The ordering with both sides' numbers, as a cell of the table."""
    sides = []
    for (entry, steps), values in zip((order.better, order.worse), order.values(results), strict=True):
        plural = "s" * (steps != "1")
        sides.append(f"{entry}, {steps} step{plural}: {median_and_range(values) if values else 'not run'}")
    sign = (">" if order.higher else "<") + "~" * order.ties_allowed
    return f"{sides[0]} {sign} {sides[1]}"


def claims_table(results: dict[str, list[dict]]) -> str:
    """Markdown: an ordering a row, with the numbers of both sides and the verdict."""
    lines = ["| # | claim | measure | asked | verdict |", "|---" * 5 + "|"]
    for claim in CLAIMS:
        for i, order in enumerate(claim.orders):
            head = f"{claim.number} | {claim.text}" if i == 0 else " | "
            lines.append(f"| {head} | {order.metric} | {describe(order, results)} | {order.verdict(results)} |")
    return "\n".join(lines)

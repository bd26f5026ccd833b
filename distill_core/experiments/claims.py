"""What the comparison says of the papers' claims: each claim is a list of orderings between entries.

An ordering is decided by the interval of the difference of the two, item by item on the same noises, in every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ..evaluation.intervals import Figure
from .entries import sized
from .results import figure_of

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"
SEEDS = 3  # fewer decide nothing


@dataclass(frozen=True)
class Order:
    """``better`` beats ``worse``; each is (entry, steps).

    metric: of the scores (`results.figure_of`).  higher: whether larger is better.  ties_allowed: the claim is only
    that ``worse`` is not better.
    """

    better: tuple[str, str]
    worse: tuple[str, str]
    metric: str = "fd"
    higher: bool = False
    ties_allowed: bool = False

    def sides(self, results: dict[str, list[dict]]) -> list[dict[int | None, Figure]]:
        """The figures of both by seed (None for the teacher, whom no seed changes)."""
        return [
            {
                run["seed"]: figure
                for run in results.get(entry, [])
                if (figure := figure_of(run["scores"].get(steps, {}), self.metric)) is not None
            }
            for entry, steps in (self.better, self.worse)
        ]

    def differences(self, results: dict[str, list[dict]]) -> dict[int, Figure]:
        """``better`` less ``worse`` in each seed that has both."""
        better, worse = self.sides(results)
        found = {}
        for seed in sorted(seed for seed in better | worse if seed is not None):
            one, other = (side.get(seed, side.get(None)) for side in (better, worse))
            if one is not None and other is not None and len(one.replicates) and len(other.replicates):
                found[seed] = one - other
        return found

    def verdict(self, results: dict[str, list[dict]]) -> str:
        """Decided where the interval of the difference lies on one side of 0 in every one of at least `SEEDS` seeds.

        With ties allowed it holds, too, where in no seed the interval says that ``better`` is worse.
        """
        sign = -1 if self.higher else 1
        intervals = [sorted(sign * end for end in figure.interval()) for figure in self.differences(results).values()]
        if len(intervals) < SEEDS:
            return OPEN
        if min(low for low, _ in intervals) > 0:
            return FAILS
        if max(high for _, high in intervals) < 0:
            return HOLDS
        return HOLDS if self.ties_allowed and max(low for low, _ in intervals) <= 0 else OPEN


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
KD, PAIRED, MATCHED = "KD", "LADD + pairs", "DMD2 + pairs"
ROLLED_OUT = "LADD + pairs, rollouts, four budgets"

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
        3,
        "Alignment grows as ADD's discriminator is told nothing, the text, the image, both (ADD table 1b)",
        [
            order
            for told, less in (
                (", told the text", ", told nothing"),
                (", told the image", ", told the text"),
                ("", ", told the image"),
            )
            for order in steps_of(f"ADD{told}", f"ADD{less}", "1", "4", metric="accuracy", higher=True)
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
        6,
        "The teacher's traits carry over: here, a larger one's student is better (ADD table 1e)",
        [
            order
            for entry in ("ADD", DISTIL)
            for order in (
                *steps_of(entry, f"{entry}, small teacher", "1"),
                *steps_of(entry, f"{entry}, small teacher", "1", metric="accuracy", higher=True),
            )
        ],
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
        10,
        "The student's size matters more than those of the teacher and of what makes its data (LADD section 4.4)",
        [
            Order((sized("teacher", "data"), "1"), (sized("student"), "1")),
            Order((sized("teacher", "data"), "1"), (sized("student"), "1"), "accuracy", higher=True),
            *(
                order
                for others in ([], ["teacher"], ["data"], ["teacher", "data"])
                for order in steps_of(sized(*others), sized("student", *others), "1")
            ),
        ],
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
    Claim(
        18,
        "The adversarial term is better than regression on the same pairs (Diffusion2GAN table 1)",
        [*steps_of(PAIRED, KD, "1", "2", "4"), *steps_of(PAIRED, KD, "1", "2", "4", metric="detail_error")],
    ),
    Claim(
        19,
        "Training all weights is better than a LoRA (knowledge distillation)",
        [*steps_of("KD, all weights", KD, "1", "2", "4")],
    ),
    Claim(
        20,
        "Distribution matching is better than regression, and its discriminator makes pairs needless (DMD2 section 4)",
        [
            *steps_of(MATCHED, KD, "1", "2", "4"),
            *steps_of(MATCHED, PAIRED, "1", "2", "4"),
            *steps_of("DMD2", MATCHED, "1", "4", ties_allowed=True),
        ],
    ),
    Claim(
        21,
        "A late adversarial term, photographs as its real side, a longer average: each helps LADD + pairs (our own)",
        [
            order
            for variant in ("adversarial late", "judged beside photographs", "long average")
            for order in steps_of(f"{PAIRED}, {variant}", PAIRED, "1", "4")
        ],
    ),
    Claim(
        22,
        "With rollouts and four budgets 4 steps are no worse than the teacher's 25 (our own)",
        [
            Order((ROLLED_OUT, "4"), ("teacher", "25"), metric, higher=metric == "accuracy", ties_allowed=True)
            for metric in ("fd", "fd_pixels", "accuracy", "detail_error")
        ],
    ),
]


def cell(figures: Sequence[Figure], form: str = ".2f", scale: float = 1.0) -> str:
    """The median over seeds, and from the lowest low to the highest high of the seeds' intervals, if they are known."""
    text = f"{scale * median(f.value for f in figures):{form}}"
    if any(len(f.replicates) == 0 for f in figures):
        return text
    ends = [scale * end for f in figures for end in f.interval()]
    return f"{text} [{min(ends):{form}}, {max(ends):{form}}]"


def describe(order: Order, results: dict[str, list[dict]]) -> str:
    """The ordering with both sides' figures, as a cell of the table."""
    sides = []
    for (entry, steps), figures in zip((order.better, order.worse), order.sides(results), strict=True):
        plural = "s" * (steps != "1")
        sides.append(f"{entry}, {steps} step{plural}: {cell(list(figures.values())) if figures else 'not run'}")
    sign = (">" if order.higher else "<") + "~" * order.ties_allowed
    return f"{sides[0]} {sign} {sides[1]}"


def claims_table(results: dict[str, list[dict]]) -> str:
    """Markdown: an ordering a row, with the figures of both sides, the interval of their difference in each seed, and
    the verdict."""
    lines = ["| # | claim | measure | asked | difference by seed | verdict |", "|---" * 6 + "|"]
    for claim in CLAIMS:
        for i, order in enumerate(claim.orders):
            head = f"{claim.number} | {claim.text}" if i == 0 else " | "
            by_seed = ", ".join(f"{figure:.2f}" for figure in order.differences(results).values())
            asked = describe(order, results)
            lines.append(f"| {head} | {order.metric} | {asked} | {by_seed} | {order.verdict(results)} |")
    return "\n".join(lines)

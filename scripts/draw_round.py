"""Draw docs/round.svg: one round of a federation, with what travels in it.

    python scripts/draw_round.py [--check]

Plain SVG with its own background, so that it reads on light and dark pages alike. `--check` writes
nothing and exits 1 if the committed picture differs.
"""

import argparse
import sys
from html import escape
from pathlib import Path

TARGET = Path(__file__).parents[1] / "docs/round.svg"
WIDTH, HEIGHT = 880, 400
INK, FAINT, DOWN, UP = "#1b2733", "#5b6b7b", "#0b6e99", "#a8480f"
SITES = ("site 1", "site 2", "site N")
SITE_WIDTH, SITE_TOP = 248, 236


def text(x: float, y: float, words: str, *, size: int = 13, fill: str = INK, bold: bool = False,
         anchor: str = "start") -> str:  # fmt: skip
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"'
        f"{weight}>{escape(words)}</text>"
    )


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'
    )


def arrow(x: float, begin: float, end: float, colour: str) -> str:
    head = 7 if end > begin else -7
    return (
        f'<path d="M{x:g} {begin:g} V{end - head:g}" stroke="{colour}" stroke-width="2"/>'
        f'<path d="M{x - 5:g} {end - head:g} h10 L{x:g} {end:g} Z" fill="{colour}"/>'
    )


def picture() -> str:
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="Helvetica, Arial, sans-serif">',
        "<title>A round: the server sends entries of its ledger, sites send scalars back</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        box(24, 20, WIDTH - 48, 108, "#eef4f8", DOWN),
        text(44, 46, "server", size=15, bold=True),
        text(44, 70, "no model, no data, no PyTorch"),
        text(44, 92, "averages scalars, appends one entry to the ledger"),
        text(44, 114, "ledger: (round, coefficients), hash-chained", fill=FAINT),
        text(474, 46, "seed = f(run seed, round, client, step)", size=14, bold=True),
        text(474, 70, "everyone derives the same seeds; none travels"),
        text(474, 92, "θ ← θ + Σ coefficient · z(seed)", size=14),
        text(474, 114, "every party applies the same entry, bit for bit", fill=FAINT),
    ]
    for place, name in enumerate(SITES):
        left = 24 + place * (SITE_WIDTH + 44)
        middle = left + SITE_WIDTH / 2
        parts += [
            arrow(middle - 62, 130, SITE_TOP - 2, DOWN),
            text(middle - 70, 176, "task", fill=DOWN, anchor="end", bold=True),
            text(middle - 70, 194, "new entries", fill=DOWN, anchor="end", size=12),
            arrow(middle + 40, SITE_TOP - 2, 130, UP),
            text(middle + 48, 176, "report", fill=UP, bold=True),
            text(middle + 48, 194, "H scalars", fill=UP, size=12),
            box(left, SITE_TOP, SITE_WIDTH, 144, "#fbf3ec", UP),
            text(left + 16, SITE_TOP + 26, name, size=15, bold=True),
            text(left + 16, SITE_TOP + 50, "model and text stay here"),
            text(left + 16, SITE_TOP + 74, "H local steps, forward only:"),
            text(left + 16, SITE_TOP + 98, "g = (ℓ(θ + μz) − ℓ(θ − μz)) / 2μ", size=14),
            text(left + 16, SITE_TOP + 124, "reports g of every step", fill=FAINT),
        ]
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if parser.parse_args().check:
        return int(TARGET.read_text(encoding="utf-8") != picture())
    TARGET.write_text(picture(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

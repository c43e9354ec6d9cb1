"""Draws the benches of `data/benches`: SVG sources and the PNG pictures made of them.

The glyph collections hold five benches, all silhouettes. Run once with
`python -m training.benches` (needs cairosvg); both kinds of file are kept.
"""

from __future__ import annotations

import cairosvg

from training.glyphs import DATA

WOOD = ("#8a5a33", "#a9713f", "#6b4224")  # seat, back, legs
IRON = "#3f454b"


def _bar(x: float, y: float, width: float, height: float, fill: str, corner: float = 3) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{corner}" fill="{fill}"/>'


def _legs(top: float, xs: tuple[float, ...], fill: str, width: float = 8) -> str:
    return "".join(_bar(x, top, width, 108 - top, fill, 2) for x in xs)


def _slats(ys: tuple[float, ...], height: float, fill: str, inset: float = 6) -> str:
    return "".join(_bar(inset, y, 128 - 2 * inset, height, fill) for y in ys)


def drawings() -> dict[str, str]:
    """Name -> the inside of a 128x128 SVG."""
    seat, back, leg = WOOD
    arms = _bar(10, 50, 6, 26, leg) + _bar(112, 50, 6, 26, leg)
    iron_arms = _bar(10, 48, 6, 30, IRON) + _bar(112, 48, 6, 30, IRON)
    posts = _bar(18, 30, 7, 48, leg) + _bar(103, 30, 7, 48, leg)
    return {
        # The first four are the generator's, the others belong to the judges.
        "park": _legs(74, (18, 102), IRON)
        + iron_arms
        + _slats((30, 46), 11, back)
        + _slats((70,), 12, seat, 4),
        "garden": posts
        + _legs(76, (16, 104), leg)
        + arms
        + _slats((32, 44, 56), 8, back, 14)
        + _slats((72,), 12, seat, 6),
        "slats": posts
        + _legs(78, (18, 102), leg)
        + _slats((28, 41, 54), 9, back)
        + _slats((72, 82), 8, seat, 4),
        "plain": posts + _legs(80, (18, 102), leg) + _slats((34,), 24, back, 8) + _slats((70,), 14, seat, 4),
        "backless": _legs(66, (20, 100), leg) + _slats((54,), 14, seat, 4),
        "upright": posts
        + _legs(76, (16, 104), leg)
        + "".join(_bar(x, 34, 8, 38, back) for x in range(16, 112, 14))
        + _bar(10, 28, 108, 9, seat)
        + _bar(6, 70, 116, 11, seat),
        "iron": _legs(74, (18, 102), IRON, 6)
        + iron_arms
        + _slats((34, 50), 8, IRON, 12)
        + _slats((72,), 10, IRON, 8),
        "stone": _bar(20, 66, 18, 42, "#8d8f92")
        + _bar(90, 66, 18, 42, "#8d8f92")
        + _bar(4, 52, 120, 18, "#a7a9ac", 4),
        "picnic": f'<path d="M34 58 L20 108 M94 58 L108 108" stroke="{leg}" stroke-width="9"/>'
        + _slats((50,), 12, seat, 16)
        + _slats((78,), 9, back, 4),
        "curved": f'<path d="M8 36 Q64 16 120 36 V58 Q64 42 8 58 Z" fill="{back}"/>'
        + posts
        + _legs(76, (14, 106), leg)
        + _slats((70,), 12, seat, 4),
        "crossed": f'<path d="M14 34 L64 68 L114 34 M14 68 L64 34 L114 68" stroke="{back}" '
        'stroke-width="7" fill="none"/>'
        + _bar(8, 26, 112, 9, back)
        + posts
        + _legs(76, (16, 104), leg)
        + _slats((68,), 12, seat, 4),
        "wide": _legs(72, (10, 60, 110), IRON) + _slats((36, 50), 10, back, 2) + _slats((68,), 11, seat, 0),
        "side": f'<path d="M16 24 L34 108 M28 76 L112 76 M104 76 L110 108" stroke="{leg}" '
        f'stroke-width="10"/>'
        + _bar(26, 66, 92, 12, seat)
        + _bar(20, 26, 84, 12, back)
        + _bar(23, 44, 84, 12, back),
    }


def main() -> None:
    """Write every drawing as `<name>.svg` and `<name>.png`."""
    folder = DATA / "benches"
    folder.mkdir(exist_ok=True)
    for name, body in drawings().items():
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">{body}</svg>\n'
        (folder / f"{name}.svg").write_text(svg)
        cairosvg.svg2png(svg.encode(), write_to=str(folder / f"{name}.png"), output_width=128)


if __name__ == "__main__":
    main()

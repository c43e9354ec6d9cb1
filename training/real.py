"""Pictures of each subject that a person drew, for the benchmark's upper bound.

`python -m training.real --out FOLDER` writes `FOLDER/<subject>/<number>.png`: scenes of one sticker, of glyph
sets that neither the generator nor a judge was trained on (but for the bench, which those sets lack).
`attend-excite benchmark score RUN --real FOLDER` reads them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import count
from pathlib import Path

from PIL import Image

from training.glyphs import SUBJECTS, GlyphBox, calibration_glyphs
from training.scenes import draw_scene


def main() -> None:
    """Draw scenes, and keep those of one sticker until there are enough of each subject."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=50, help="of each subject, as in the paper")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    box, drawn = GlyphBox(calibration_glyphs()), Counter[str]()
    for index in count():
        scene = draw_scene(box, arguments.seed, index)
        subject = scene.subjects[0]
        if len(scene.subjects) == 1 and drawn[subject] < arguments.images:
            folder = arguments.out / subject
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene.image).save(folder / f"{drawn[subject]:03}.png")
            drawn[subject] += 1
        if drawn.total() == arguments.images * len(SUBJECTS):
            return


if __name__ == "__main__":
    main()

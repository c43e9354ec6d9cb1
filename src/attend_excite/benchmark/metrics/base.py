"""What a metric is, and where its model comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from attend_excite.metadata import digest_of
from attend_excite.models import source_of
from attend_excite.models.catalogue import seek

Row = Mapping[str, Any]
"""A row of a run, of which a metric reads `job`, `prompt` and `subjects`."""


class Metric(ABC):
    """Judges images a batch at a time: `update` with each, then `compute`.

    Attributes:
        name: the folder of its scores.
        scored_by: the model and the settings that the scores depend on. Scores by another are no longer
            this metric's.
        unjudged: why some images got no verdict -> how many.
    """

    name: ClassVar[str]

    def __init__(self, scored_by: str) -> None:
        self.scored_by = scored_by
        self.unjudged = Counter[str]()
        self._scores: list[dict[str, Any]] = []

    @torch.inference_mode()
    def update(self, images: Sequence[Image.Image], rows: Sequence[Row]) -> None:
        """Judge a batch of images.

        Args:
            images: RGB.
            rows: those of the images.
        """
        scores = self._judge(images, rows)
        self._scores += [
            {"job": row["job"], "scored_by": self.scored_by} | score
            for row, score in zip(rows, scores, strict=True)
        ]

    def compute(self) -> list[dict[str, Any]]:
        """The scores of all images since it was last called, a row each: `job`, `scored_by` and the
        metric's own columns."""
        scores, self._scores = self._scores, []
        return scores

    @abstractmethod
    def _judge(self, images: Sequence[Image.Image], rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The metric's own columns, a row an image."""


def signature(name: str) -> str:
    """How a judge signs its scores: by its name, to which one that lies here, in a folder or in the package,
    adds a digest of its files, so that scores aren't mixed with those that it gave before it was changed."""
    folder = Path(source_of(name))
    if not folder.is_dir():
        return name
    # Models lie in the folder itself; what is below it are other states of the training.
    files = [
        path for path in folder.iterdir() if path.is_file() and path.name[0] != "." and path.suffix != ".md"
    ]
    return f"{name} ({digest_of(folder, files)[:8]})"


def pretrained(kind: Any, name: str, device: str | torch.device) -> tuple[Any, Any]:
    """A model of transformers, frozen, and its processor.

    Args:
        kind: an `Auto` class for the model.
        name: a short name, a folder or a Hub id.
        device: where it goes.

    Raises:
        ValueError: there is no such model, or it is of another kind.
    """
    from transformers import AutoProcessor

    source = source_of(name)
    # What is in half precision on disk is slow on a CPU.
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    try:
        seek(source, "config.json")
        model = kind.from_pretrained(source, dtype=dtype).to(device).eval().requires_grad_(False)
        return model, AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"'{name}' cannot be loaded to judge images: {reason}") from error

"""The presence judge: which subjects, in which colours, are in a picture.

A fully convolutional network that names the subject and the colour of each cell of an
8 x 8 grid; a subject is present where some cells say so. The bundled one, `stickers-judge`,
is trained by `training/judge.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

OWN = "own"  # the colour label of a sticker in its natural colours
INPUT = 64  # pictures are shrunk to this side first: what is soft or sharp looks the same
TOP_CELLS = 3  # a subject's score is the mean of its best cells; one cell may be an accident


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """N x 3 x H x W in [-1, 1] of N images of one size."""
    stack = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


@dataclass(frozen=True)
class Verdict:
    """Of B pictures: `scores` B x S in [0, 1], and `colours` B x S x C, the chances of each
    colour where the subject is most likely (the last colour is `OWN`)."""

    scores: Tensor
    colours: Tensor


class Judge(nn.Module):
    """Pictures to cells. `thresholds` (S) are the scores from which a subject is present."""

    def __init__(self, subjects: list[str], colours: list[str], width: int = 32) -> None:
        super().__init__()
        self.subjects, self.colours, self.width = list(subjects), list(colours), width
        self.body = nn.Sequential(
            _block(3, width, 2),
            _block(width, 2 * width, 2),
            _block(2 * width, 4 * width, 2),
            _block(4 * width, 6 * width, 1),
        )
        self.subject_head = nn.Conv2d(6 * width, 1 + len(self.subjects), 1)
        # Colour needs sharp places more than wide context: it also sees an early layer.
        self.colour_head = nn.Conv2d(6 * width + width, len(self.colours) + 1, 1)
        self.register_buffer("thresholds", torch.full((len(self.subjects),), 0.5))

    def index_of(self, subject: str) -> int | None:
        """The index of what a subject is, which is what it ends in: "big yellow bowl" is a bowl. None: it is
        nothing that the judge knows."""
        for index, name in enumerate(self.subjects):
            if re.search(rf"(^| ){re.escape(name)}$", subject, re.IGNORECASE):
                return index
        return None

    def cells(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """B x 3 x H x W in [-1, 1] to logits B x (1 + S) x 8 x 8 (0 is background) and
        B x (C + 1) x 8 x 8."""
        small = F.interpolate(images, (INPUT, INPUT), mode="area")
        early = self.body[0](small)
        deep = self.body[1:](early)
        pooled = F.adaptive_avg_pool2d(early, deep.shape[-2:])
        return self.subject_head(deep), self.colour_head(torch.cat([deep, pooled], dim=1))

    def forward(self, images: Tensor) -> Verdict:
        """Judge B x 3 x H x W pictures in [-1, 1], each in the mirror too: the mean errs less than either."""
        subjects, colours = (
            (here.softmax(dim=1) + there.flip(3).softmax(dim=1)).flatten(2) / 2
            for here, there in zip(self.cells(images), self.cells(images.flip(3)), strict=True)
        )
        chances = subjects[:, 1:]
        scores = chances.topk(TOP_CELLS, dim=2).values.mean(dim=2)
        where = chances / chances.sum(dim=2, keepdim=True).clamp(min=1e-6)
        return Verdict(scores, torch.einsum("bsp,bcp->bsc", where, colours))

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"subjects": self.subjects, "colours": self.colours, "width": self.width}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Read what `save` wrote."""
        judge = cls(**json.loads((folder / "config.json").read_text()))
        judge.load_state_dict(load_file(folder / "model.safetensors"))
        return judge.eval()

"""Is each subject there, and in its colour? An open-vocabulary detector's verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from attend_excite.benchmark.geneval import Box, Detection, asked_of, reasons_against
from attend_excite.benchmark.metrics.base import Metric, Row, pretrained, signature
from attend_excite.benchmark.metrics.clip import Clip
from attend_excite.benchmark.metrics.presence import COLUMNS, colours, colours_of, verdict, without_colour

THRESHOLD = 0.3
"""The confidence from which a box counts, as in GenEval."""


class DetectedPresence(Metric):
    """A detector's `verdict`: a subject is present where its best box is sure enough, and has the colour that
    CLIP finds likeliest of the crop (Ghosh et al., GenEval, 2023). A prompt without subjects has none: its
    columns are null.

    Args:
        detector: OWLv2, Grounding DINO or another of transformers' zero-shot detectors.
        clip: what names colours.
        device: where the detector goes.

    Raises:
        ValueError: there is no such detector.
    """

    name = "detector"

    def __init__(self, detector: str, clip: Clip, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModelForZeroShotObjectDetection

        super().__init__(f"{signature(detector)} and {clip.signature}, from {THRESHOLD:g}")
        self._clip = clip
        self._model, self._processor = pretrained(AutoModelForZeroShotObjectDetection, detector, device)

    def _judge(self, images: Sequence[Image.Image], rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [self._verdict(image, row) for image, row in zip(images, rows, strict=True)]

    def _verdict(self, image: Image.Image, row: Row) -> dict[str, Any]:
        scores, fits = [], []
        subjects = row["subjects"] or []
        if not subjects:
            self.unjudged["no subject named"] += 1
            return dict.fromkeys(COLUMNS)
        things = [without_colour(subject) for subject in subjects]
        wanted_of = colours_of(subjects, row["prompt"])
        for thing, wanted, (score, box) in zip(things, wanted_of, self._best(image, things), strict=True):
            scores.append(score)
            fits.append(None if wanted is None else self.colour(image.crop(box), thing) == wanted)
        return verdict(scores, [score >= THRESHOLD for score in scores], fits)

    def _best(self, image: Image.Image, subjects: Sequence[str]) -> list[Detection]:
        """The surest box of each subject."""
        return [max(of_it) for of_it in self.boxes(image, subjects)]

    def boxes(self, image: Image.Image, subjects: Sequence[str]) -> list[list[Detection]]:
        """All boxes of each subject, however unsure."""
        # One subject a row of the batch: detectors that read one sentence confuse the words in it.
        texts = [[f"a {subject}"] for subject in subjects]
        inputs = self._processor(images=[image] * len(texts), text=texts, padding=True, return_tensors="pt")
        outputs = self._model(**inputs.to(self._model.device, self._model.dtype))
        found = self._processor.post_process_grounded_object_detection(
            outputs, threshold=0.0, target_sizes=[(image.height, image.width)] * len(texts)
        )
        return [
            [
                Detection(score, _inside(box, image))
                for score, box in zip(boxes["scores"].tolist(), boxes["boxes"].tolist(), strict=True)
            ]
            for boxes in found
        ]

    def colour(self, crop: Image.Image, subject: str) -> str:
        """The colour that is likeliest of a part of an image that shows a subject."""
        texts = self._clip.texts([f"a photo of a {colour} {subject}" for colour in colours()])
        return colours()[int((texts @ self._clip.images([crop])[0]).argmax())]


class GenEval(Metric):
    """The verdict of GenEval's rule on prompts that say what it asks (Ghosh et al., 2023): see
    `geneval.reasons_against`. Others have none: their columns are null.

    Args:
        detector: what finds things, and names their colours.
    """

    name = "geneval"

    def __init__(self, detector: DetectedPresence) -> None:
        super().__init__(detector.scored_by)
        self._detector = detector

    def _judge(self, images: Sequence[Image.Image], rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [self._verdict(image, row) for image, row in zip(images, rows, strict=True)]

    def _verdict(self, image: Image.Image, row: Row) -> dict[str, Any]:
        if not row.get("wanted"):
            return {"right": None, "reasons": None}
        asked = asked_of(json.loads(row["wanted"]))
        boxes = self._detector.boxes(image, asked.things)
        found = {
            thing: [detection for detection in of_it if detection.confidence >= THRESHOLD]
            for thing, of_it in zip(asked.things, boxes, strict=True)
        }
        reasons = reasons_against(
            asked, found, lambda box, thing: self._detector.colour(image.crop(box), thing)
        )
        return {"right": not reasons, "reasons": reasons}


def _inside(box: Sequence[float], image: Image.Image) -> Box:
    """A box in whole pixels of the image, at least one of them."""
    left, right = (min(max(round(x), 0), image.width) for x in box[0::2])
    top, bottom = (min(max(round(y), 0), image.height) for y in box[1::2])
    left, top = min(left, image.width - 1), min(top, image.height - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)

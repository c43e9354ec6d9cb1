"""CLIP similarity of the prompt to a caption of the image: text against text (Section 5.2, A.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from attend_excite.benchmark.metrics.base import Metric, Row, pretrained, signature
from attend_excite.benchmark.metrics.clip import Clip

PROMPT = "a picture of "
"""How every caption begins; it is taken off again."""

# LAVIS's settings for BLIP, which the paper took its captions from; lengths in tokens, the prompt's included.
_SEARCH = {"num_beams": 3, "min_length": 10, "max_length": 30, "do_sample": False}


class CaptionSimilarity(Metric):
    """`caption` of the image, and its cosine `similarity` to the prompt. The prompt is averaged over the
    templates, the caption stands as it is (A.3).

    Args:
        captioner: a BLIP captioner: a short name, a folder or a Hub id.
        clip: what compares the texts.
        device: where the captioner goes.

    Raises:
        ValueError: there is no such captioner.
    """

    name = "captions"

    def __init__(self, captioner: str, clip: Clip, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModelForImageTextToText

        super().__init__(f"{signature(captioner)} and {clip.described}")
        self._clip = clip
        self._model, self._processor = pretrained(AutoModelForImageTextToText, captioner, device)

    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        """One an image, without the words that all begin with."""
        inputs = self._processor(images=list(images), text=[PROMPT] * len(images), return_tensors="pt")
        ids = self._model.generate(**inputs.to(self._model.device, self._model.dtype), **_SEARCH)
        texts = self._processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip().removeprefix(PROMPT.strip()).strip() for text in texts]

    def _judge(self, images: Sequence[Image.Image], rows: Sequence[Row]) -> list[dict[str, Any]]:
        captions = self.captions(images)
        prompts = torch.stack([self._clip.prompt(row["prompt"]) for row in rows])
        similarities = (self._clip.texts(captions) * prompts).sum(dim=-1).tolist()
        return [
            {"caption": caption, "similarity": similarity}
            for caption, similarity in zip(captions, similarities, strict=True)
        ]

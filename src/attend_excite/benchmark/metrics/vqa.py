"""How sure a vision-language model is that the image shows the prompt: P("yes"), as in VQAScore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from attend_excite.benchmark.metrics.base import Metric, Row, pretrained, signature

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
"""The question of VQAScore (Lin et al., 2024)."""


class VqaScore(Metric):
    """`yes`: the chance that the answer begins with yes, 0 to 1.

    Args:
        model: a vision-language model of transformers that chats: a short name, a folder or a Hub id.
        device: where it goes.

    Raises:
        ValueError: there is no such model.
    """

    name = "vqa"

    def __init__(self, model: str, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModelForImageTextToText

        super().__init__(signature(model))
        self._model, self._processor = pretrained(AutoModelForImageTextToText, model, device)
        # What is read is the last position: with padding on the left it is every text's own.
        self._processor.tokenizer.padding_side = "left"

    def _judge(self, images: Sequence[Image.Image], rows: Sequence[Row]) -> list[dict[str, Any]]:
        texts = [
            self._processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in (QUESTION.format(row["prompt"]) for row in rows)
        ]
        inputs = self._processor(
            images=[[image] for image in images], text=texts, padding=True, return_tensors="pt"
        )
        answers = self._model(**inputs.to(self._model.device, self._model.dtype)).logits[:, -1]
        return [{"yes": chance} for chance in chance_of_yes(answers, self._processor.tokenizer).tolist()]


def chance_of_yes(logits: Tensor, tokenizer: Any) -> Tensor:
    """The chance of "yes" in any of its spellings.

    Args:
        logits: (images, vocabulary), of the first token of the answer.
        tokenizer: the model's.

    Returns:
        (images,), 0 to 1.
    """
    spellings = tokenizer(["yes", "Yes", " yes", " Yes"], add_special_tokens=False).input_ids
    whole = {tokens[0] for tokens in spellings if len(tokens) == 1}
    return logits.float().softmax(dim=-1)[:, sorted(whole)].sum(dim=-1)

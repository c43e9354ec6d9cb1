"""From the words of a caption to the tokens of CLIP's vocabulary."""

from __future__ import annotations

import numpy as np
from transformers import CLIPTokenizer


def token_positions(tokenizer: CLIPTokenizer, caption: str) -> list[list[int]]:
    """For each word of `caption.split()`, where its tokens stand; <sot> is at 0."""
    positions, at = [], 1
    for word in caption.split():
        # CLIP's BPE never joins two words, so each can be measured alone.
        count = len(tokenizer(word, add_special_tokens=False).input_ids)
        positions.append(list(range(at, at + count)))
        at += count
    return positions


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> np.ndarray:
    """N x T int64, padded to the tokenizer's own length."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="np").input_ids.astype(
        np.int64
    )

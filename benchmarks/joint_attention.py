"""Reading joint attention at FLUX's shape for 1024 pixels: the whole matrix, or indicator columns.

`python benchmarks/joint_attention.py` prints peak memory and time of one layer, forward and backward, on
the CPU: of the layer's own fused attention, of the matrix written out, and of
`attention.record.text_attention`, each in a process of its own, all three in turns. 4096 image and 512 text
tokens, 24 heads of 128, float32.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

from attend_excite.attention.record import text_attention

WAYS = ("fused", "naive", "ours")


def run(way: str, image: int, text: int, heads: int, width: int, columns: int) -> float:
    """Seconds of one forward and backward pass."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, text + image, width, generator=generator).requires_grad_(True) for _ in range(3)
    )
    wanted = list(range(columns))
    began = time.perf_counter()
    if way == "fused":
        loss = F.scaled_dot_product_attention(query, key, value).square().mean()
    elif way == "naive":
        # As a stored map is had: the whole softmax of the image's rows, then the words' columns of it.
        scores = query[:, :, text:] @ key.transpose(-1, -2) / width**0.5
        loss = scores.softmax(dim=-1)[..., wanted].mean(dim=1).square().mean()
    else:
        loss = text_attention(query[:, :, text:], key, wanted).square().mean()
    torch.autograd.grad(loss, [query, key])
    return time.perf_counter() - began


def main() -> None:
    """Measure each way by turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--way", choices=WAYS, help="one pass of one way, in this process")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--image", type=int, default=4096, help="image tokens")
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--columns", type=int, default=20, help="words that are read")
    given = parser.parse_args()
    if given.way:
        tensors = 4 * 3 * given.heads * (given.image + given.text) * given.width
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + tensors
        seconds = run(given.way, given.image, given.text, given.heads, given.width, given.columns)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        print(seconds, max(peak, 0) / 2**20)
        return
    figures: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(given.turns):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            figures[way].append((float(seconds), float(peak)))
    for way in WAYS:
        seconds, peaks = zip(*sorted(figures[way]), strict=True)
        middle = len(seconds) // 2
        print(
            f"{way:>6}: {seconds[middle]:.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}), {max(peaks):.0f} MiB"
        )


if __name__ == "__main__":
    main()

"""The peak memory of one guidance step, above the weights, in a process of its own.

    python -m attend_excite.bench.memory --size full --whose ours

prints it in MiB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from attend_excite.bench.sizes import SIZES, build
from attend_excite.bench.works import guidance_steps

_STATUS = Path("/proc/self/status")


def can_be_measured() -> bool:
    """Whether this system says what a process had at its peak; Linux does."""
    return _STATUS.is_file()


def peak_of_guidance(
    size: str, whose: str, *, latent_side: int | None = None, images: int = 1, checkpointing: bool = False
) -> float:
    """MiB above the weights, measured in a fresh process.

    Args:
        size: one of `SIZES`.
        whose: "ours" or "diffusers", which takes one image.
        latent_side: cells of the latent; None: the size's own. 64 stands for 512 pixels, 96 for 768.
        images: of the batch.
        checkpointing: whether the UNet works activations out again on the way back.

    Raises:
        RuntimeError: the process ended early, for lack of memory as a rule.
    """
    command = [sys.executable, "-m", __name__, "--size", size, "--whose", whose, "--images", str(images)]
    if latent_side is not None:
        command += ["--latent-side", str(latent_side)]
    if checkpointing:
        command += ["--checkpointing"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no peak of {whose}: its process ended with status {done.returncode}")
    return float(done.stdout.strip().rsplit("\n", 1)[-1])


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--whose", choices=("ours", "diffusers"), required=True)
    parser.add_argument("--latent-side", type=int)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    subject = build(options.size)
    if side := options.latent_side:
        # The layers stay the same: maps of a larger latent are larger.
        map_side = subject.map_side * side // subject.latent_side
        subject = replace(subject, latent_side=side, map_side=map_side)
    if options.checkpointing:
        subject.ours.unet.enable_gradient_checkpointing()
    work = guidance_steps(subject, images=options.images)[options.whose]
    # Loading had its own peak.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_kib()
    work()
    print((_peak_kib() - before) / 1024)


def _peak_kib() -> int:
    return int(_STATUS.read_text().split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    _main()

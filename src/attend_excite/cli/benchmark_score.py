"""Judge the images that a command line asks for, and show how it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from attend_excite.benchmark import store
from attend_excite.benchmark.metrics import Clip
from attend_excite.benchmark.metrics.clip import Wording
from attend_excite.benchmark.score import judges_for, score, score_real_images
from attend_excite.cli.messages import MESSAGES, warn
from attend_excite.cli.summary import RESULTS
from attend_excite.models.loading import is_usable


def score_benchmark(
    run: str,
    names: Mapping[str, str | None],
    wording: Wording,
    real: Path | None,
    device: str | None,
    batch_size: int,
) -> None:
    """Judge what isn't judged yet.

    Args:
        run: the run's folder, or its URL.
        names: of the judges, as typed.
        wording: how prompts are put into templates.
        real: a folder of real images for each subject.
        device: where the judges go; None: the best there is.
        batch_size: images at once.

    Raises:
        ValueError: there is no run, no such judge, or no such device.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}: it must be 1 or more")
    judges = judges_for(store.read_settings(run)["model"]).replaced(names)
    if real is not None and judges.clip is None:
        raise ValueError("--real needs CLIP: leave --clip none out")
    if device is not None and not is_usable(device):
        raise ValueError(f"the device '{device}' is not here: leave --device out, or use cpu")
    on = _best_device() if device is None else torch.device(device)
    with MESSAGES.status("loading the judges"):
        metrics = judges.metrics(on, wording)
    with _progress() as advance:
        tally = score(run, metrics, batch_size=batch_size, progress=advance)
    for metric in metrics:
        for reason, images in metric.unjudged.items():
            warn(f"{metric.scored_by} gave no verdict on {images} images: {reason}")
    if real is not None and judges.clip is not None:
        with MESSAGES.status("looking at real images"):
            score_real_images(run, Clip(judges.clip, on, wording), real)
    pace = f", {tally.images_a_second:.1f} a second" if tally.scored else ""
    RESULTS.print(
        f"{tally.scored} images judged{pace}; {tally.before} were before; "
        f"left out: {tally.nsfw} black, {tally.failed} failed"
    )


def _best_device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn("judging"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=MESSAGES, transient=True) as bar:
        # How many there are isn't known before the folder is read.
        task = bar.add_task("", total=None, count="")

        def advance(done: int, images: int) -> None:
            bar.update(task, total=images, completed=done, count=f"{done} of {images} images")

        yield advance

"""Judges the images of a run: each is read once, and what was judged stays judged."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from attend_excite.benchmark import metrics, store
from attend_excite.benchmark.metrics import Clip, Metric
from attend_excite.benchmark.metrics.clip import Wording
from attend_excite.benchmark.names import is_bundled

UPPER_BOUND = "upper-bound"
"""The folder of what CLIP says of real images: a row a subject, whose `job` is the subject."""

_WRITE_EVERY = 512
_NAMED = 3
_READERS = 4
_IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Judges:
    """The names of the models that judge; None: that metric is left out.

    Attributes:
        clip: image-text similarity, and the texts of the others.
        captioner: text-text similarity.
        judge: presence, of sticker pictures.
        detector: presence, of any.
        vqa: P("yes").
    """

    clip: str | None = None
    captioner: str | None = None
    judge: str | None = None
    detector: str | None = None
    vqa: str | None = None

    def replaced(self, names: Mapping[str, str | None]) -> Judges:
        """With others by name: "none" leaves one out, None keeps it.

        Raises:
            ValueError: a judge that needs CLIP is left without it, or nobody is left.
        """
        judges = replace(
            self, **{key: None if name == "none" else name for key, name in names.items() if name}
        )
        if judges.clip is None and (judges.captioner or judges.detector):
            raise ValueError("captions and the detector's colours need CLIP: leave those out too")
        if not any(astuple(judges)):
            raise ValueError('nobody is left to judge: name a judge, or take a "none" away')
        return judges

    def metrics(self, device: str | torch.device, wording: Wording) -> list[Metric]:
        """The metrics, with their models loaded.

        Raises:
            ValueError: there is no such model.
        """
        wanted: list[Metric] = []
        if self.clip:
            clip = Clip(self.clip, device, wording)
            wanted.append(metrics.ClipSimilarity(clip))
            if self.captioner:
                wanted.append(metrics.CaptionSimilarity(self.captioner, clip, device))
            if self.detector:
                detector = metrics.DetectedPresence(self.detector, clip, device)
                wanted += [detector, metrics.GenEval(detector)]
        if self.judge:
            wanted.append(metrics.JudgedPresence(self.judge, device))
        if self.vqa:
            wanted.append(metrics.VqaScore(self.vqa, device))
        return wanted


STICKERS = Judges(clip="stickers-clip", captioner="stickers-captioner", judge="stickers-judge")
PAPER = Judges(clip="openai/clip-vit-base-patch16", captioner="Salesforce/blip-image-captioning-base")


def judges_for(model: str) -> Judges:
    """Who judges a model's images unless told otherwise: the bundled judges those of the bundled models,
    the paper's all others."""
    return STICKERS if is_bundled(model) else PAPER


@dataclass(frozen=True)
class Tally:
    """What `score` did.

    Attributes:
        scored: images that were judged now.
        before: images that all metrics had judged before.
        nsfw: images that were blacked out and are left out (A.3).
        failed: images that could not be drawn.
        missing: images that were to be judged now, and whose file is gone or broken.
        seconds: that it took, loading of models excluded.
    """

    scored: int
    before: int
    nsfw: int
    failed: int
    missing: int
    seconds: float

    @property
    def images_a_second(self) -> float:
        """NaN where nothing was judged."""
        return self.scored / self.seconds if self.scored else float("nan")


def score(
    run: str | Path,
    metrics: Sequence[Metric],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Tally:
    """Judge the images of a run that are not judged yet, and write the scores beside them.

    An image is read once, for all metrics that lack it. Scores are written as they come, so that an end at
    any moment loses a few hundred of them. Scores by another model, or in another wording, are made anew.
    Images whose file is gone or broken are left unjudged, with a warning that names them: the run doesn't
    count them as done either. A score counts for the image that it was given to, and not for another that
    was drawn in its place since.

    Args:
        run: the run's folder, or its URL.
        metrics: who judges.
        batch_size: images at once.
        progress: called with the images judged and the images to judge, after every batch.

    Raises:
        ValueError: there is no run.
    """
    store.read_settings(run)
    rows = store.read_rows(run).to_pylist()
    shown = [row for row in rows if row["image"] is not None and not row["nsfw"]]
    digests = {row["job"]: row["digest"] for row in shown}
    missing: dict[Metric, set[str]] = {}
    attempts: dict[Metric, int] = {}
    for metric in metrics:
        store.set_aside_broken(run, f"scores/{metric.name}")
        missing[metric], attempts[metric] = _missing(run, metric, shown)
    wanted = set().union(*missing.values())
    unjudged = [row for row in shown if row["job"] in wanted]
    sizes = store.image_sizes(run)
    todo = [row for row in unjudged if store.is_whole(row, sizes)]
    gone = [row["image"] for row in unjudged if not store.is_whole(row, sizes)]

    def write() -> None:
        for metric in metrics:
            more = {"attempt": attempts[metric]}
            if scores := [score | {"digest": digests[score["job"]]} | more for score in metric.compute()]:
                store.write_scores(run, metric.name, scores)

    began = time.perf_counter()
    try:
        for batch, images, done in _batches(run, todo, batch_size):
            for row, image in zip(batch, images, strict=True):
                if image is None:
                    gone.append(row["image"])
            for metric in metrics:
                chosen = [
                    (image, row)
                    for row, image in zip(batch, images, strict=True)
                    if image is not None and row["job"] in missing[metric]
                ]
                if chosen:
                    metric.update([image for image, _ in chosen], [row for _, row in chosen])
            if done // _WRITE_EVERY != (done - len(batch)) // _WRITE_EVERY:
                write()
            if progress is not None:
                progress(done, len(todo))
    finally:
        write()
    if gone:
        count = "1 picture is" if len(gone) == 1 else f"{len(gone)} pictures are"
        named = ", ".join(gone[:_NAMED]) + (", …" if len(gone) > _NAMED else "")
        warnings.warn(
            f"{count} gone or broken, so nobody could judge them ({named}): the same attend-excite benchmark "
            "run as before draws them again",
            stacklevel=2,
        )
    return Tally(
        scored=len(unjudged) - len(gone),
        before=len(shown) - len(unjudged),
        nsfw=sum(bool(row["nsfw"]) for row in rows),
        failed=sum(row["image"] is None for row in rows),
        missing=len(gone),
        seconds=time.perf_counter() - began,
    )


def score_real_images(run: str | Path, clip: Clip, folder: Path) -> None:
    """What CLIP says of real images: no generated one can be expected to do better (Figure 8's upper bound).

    Args:
        run: the run's folder, or its URL.
        clip: what compares image and text: "a cat", over the templates.
        folder: one folder of images a subject, each with the subject's name; 50 images each in the paper.

    Raises:
        ValueError: see `real_images`.
    """
    rows = []
    for subject, paths in real_images(folder).items():
        with torch.inference_mode():
            images = clip.images([Image.open(path).convert("RGB") for path in paths])
            similarity = float((images @ clip.prompt(f"a {subject}")).mean())
        rows.append(
            {"job": subject, "scored_by": clip.described, "similarity": similarity, "images": len(paths)}
        )
    store.write_scores(run, UPPER_BOUND, rows)


def real_images(folder: Path) -> dict[str, list[Path]]:
    """The images of each subject in a folder of real ones.

    Raises:
        ValueError: there is no such folder, or it has no folders with images.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder '{folder}': real images are in a folder for each subject in it")
    subjects = {path.name: _image_files(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    if not any(subjects.values()):
        raise ValueError(f"'{folder}' has no images: it must hold a folder of images for each subject")
    return {subject: paths for subject, paths in subjects.items() if paths}


def _image_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in _IMAGE_FILES]


def _missing(run: str | Path, metric: Metric, rows: Sequence[Mapping[str, Any]]) -> tuple[set[str], int]:
    """The jobs that a metric has yet to judge, and how often any had been judged before, at most."""
    scores = store.read_scores(run, metric.name).to_pylist()
    judged = {score["job"]: score.get("digest") for score in scores if score["scored_by"] == metric.scored_by}
    left = {row["job"] for row in rows if row["job"] not in judged or judged[row["job"]] != row["digest"]}
    before = (score.get("attempt") or 0 for score in scores if score["job"] in left)
    return left, 1 + max(before, default=-1)


def _batches(
    run: str | Path, rows: Sequence[dict[str, Any]], size: int
) -> Iterator[tuple[list[dict[str, Any]], list[Image.Image | None], int]]:
    """Rows, their images, and how many rows there have been; the next images are read meanwhile.

    None for an image that is gone or broken; what is broken is set aside.
    """

    def read(row: Mapping[str, Any]) -> Image.Image | None:
        try:
            return store.read_image(run, row["image"]).convert("RGB")
        except FileNotFoundError:
            return None
        except store.BrokenImageError:
            store.set_aside(run, row["image"])
            return None

    batches = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    with ThreadPoolExecutor(_READERS) as readers:
        coming = [readers.submit(read, row) for row in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            images = [image.result() for image in coming]
            following = batches[number + 1] if number + 1 < len(batches) else []
            coming = [readers.submit(read, row) for row in following]
            yield batch, images, size * number + len(batch)

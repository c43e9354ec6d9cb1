"""Trains and calibrates the presence judge on glyph sets that the generator never saw.

`python -m training.judge` trains, on scenes of which a third went through the generator's
autoencoder, since what it is to judge did; `python -m training.judge --calibrate` sets the
thresholds on the calibration sets, sent through it too, and measures the judge on the
generator's sets, which are as new to it as its own are to the generator; `--measure` does
the latter alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from attend_excite.models.catalogue import source_of
from attend_excite.models.judge import OWN, Judge
from training.glyphs import (
    COLOURS,
    SUBJECTS,
    GlyphBox,
    JostledBox,
    calibration_glyphs,
    generator_glyphs,
    judge_glyphs,
)
from training.loop import Average, train, use_one_thread, warmup_cosine
from training.muon import Muon
from training.scenes import SIZE, Scene, draw_scene
from training.vae import load_vae, through, to_tensor

CELLS = 8
COLOUR_LIST = [*COLOURS, OWN]
UNCLEAR = -100  # what cross_entropy ignores
TRAIN_SEED, CALIBRATION_SEED, TEST_SEED = 5, 6, 7
CLEAR_COVER = 0.4
LEAST_SURE = 0.02  # no threshold is lower


def labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The subject (0 is background) and the colour of each of 8 x 8 cells."""
    block = SIZE // CELLS
    share = scene.cover.reshape(-1, CELLS, block, CELLS, block).mean(axis=(2, 4))
    best, owner = share.max(axis=0), share.argmax(axis=0)
    subjects = np.array([1 + SUBJECTS.index(name) for name in scene.subjects])
    colours = np.array([COLOUR_LIST.index(name or OWN) for name in scene.colours])
    subject = np.where(best > CLEAR_COVER, subjects[owner], UNCLEAR)
    subject[best < 0.02] = 0
    colour = np.where(best > CLEAR_COVER, colours[owner], UNCLEAR)
    return subject, colour


def softened(images: Tensor, rng: np.random.Generator, blurs: tuple[int, ...] = (1, 1, 2, 3, 4)) -> Tensor:
    """B x 3 x H x W with the faults of a generator: blur by one of `blurs` pixels, noise,
    shifted colours."""
    factor = rng.choice(blurs)
    if factor > 1:
        small = F.interpolate(images, scale_factor=1 / factor, mode="area")
        images = F.interpolate(small, images.shape[-2:], mode="bilinear")
    strength = rng.uniform(0, 0.12)
    coarse = torch.from_numpy(rng.standard_normal((*images.shape[:2], 32, 32))).float()
    images = images + strength * F.interpolate(coarse, images.shape[-2:], mode="bilinear")
    tone = rng.uniform(-0.08, 0.08, (len(images), 3, 1, 1))
    gain = rng.uniform(0.85, 1.08, (len(images), 1, 1, 1))
    return (images * torch.from_numpy(gain).float() + torch.from_numpy(tone).float()).clamp(-1, 1)


def distorted(images: Tensor, rng: np.random.Generator) -> Tensor:
    """B x 3 x H x W, bent by some pixels here and there, more or less saturated and rich in
    contrast: a generator draws no glyph as it learnt it, and nursing makes colours louder."""
    count, _, height, width = images.shape
    bends = torch.from_numpy(rng.normal(0, 0.03, (count, 2, 6, 6))).float()
    bends = F.interpolate(bends, (height, width), mode="bicubic").permute(0, 2, 3, 1)
    same = F.affine_grid(torch.eye(2, 3).expand(count, -1, -1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, same + bends, padding_mode="border", align_corners=False)
    saturation, contrast = (
        torch.from_numpy(rng.uniform(low, high, (count, 1, 1, 1))).float()
        for low, high in ((0.6, 1.8), (0.8, 1.3))
    )
    gray = images.mean(dim=1, keepdim=True)
    return (contrast * (gray + saturation * (images - gray))).clamp(-1, 1)


def asked(scenes: list[Scene]) -> np.ndarray:
    """N x S bool: which subjects are in each scene."""
    return np.array([[name in scene.subjects for name in SUBJECTS] for scene in scenes])


@torch.no_grad()
def verdicts(judge: Judge, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scores N x S and colour chances N x S x (C + 1) of N pictures in [-1, 1]."""
    parts = [judge(part) for part in images.split(64)]
    scores = torch.cat([part.scores for part in parts])
    return scores.numpy(), torch.cat([part.colours for part in parts]).numpy()


def even_thresholds(scores: np.ndarray, present: np.ndarray) -> np.ndarray:
    """S thresholds that let as many false alarms pass for each subject, of N x S scores.

    A subject's own few glyphs don't decide on its threshold: that is set by the pictures
    that don't show it. Of all rates of false alarms that one is taken at which the misses
    and, twice, the false alarms sum to least: a false alarm hides the neglect that is to
    be measured.
    """
    subjects = range(scores.shape[1])
    best, lowest = np.full(len(subjects), 0.5), np.inf
    for rate in np.arange(0.005, 0.1, 0.005):
        quantiles = [np.quantile(scores[~present[:, s], s], 1 - rate) for s in subjects]
        thresholds = np.maximum(quantiles, LEAST_SURE)
        found = scores >= thresholds
        cost = (~found)[present].mean() + 2 * found[~present].mean()
        if cost < lowest:
            best, lowest = thresholds, cost
    return best


def drawn_together(thresholds: np.ndarray) -> np.ndarray:
    """S thresholds, each halfway (geometrically) to the mean of all.

    Each is known from the drawings of three sets alone: what they say of one subject is
    partly chance, and half of it is kept.
    """
    return np.sqrt(thresholds * np.exp(np.log(thresholds).mean()))


def middle(one: Judge, other: Judge) -> Judge:
    """The judge halfway between two of which one was trained on from the other: it knows
    what the later learnt and forgets less of the earlier (after WiSE-FT)."""
    ends = one.state_dict(), other.state_dict()
    between = Judge(one.subjects, one.colours, one.width)
    between.load_state_dict(
        {n: (v + ends[1][n]) / 2 if v.is_floating_point() else v for n, v in ends[0].items()}
    )
    return between


def figures(judge: Judge, scenes: list[Scene], images: Tensor) -> dict[str, float]:
    """What the judge gets right on scenes whose truth is known.

    `decisions`: of all yes-or-no decisions on a subject, those right; `shown`: of the
    subjects in the scenes, those found; `absent`: of the others, those not found;
    `exact`: scenes judged without any mistake; `colour`: of the named colours of subjects
    found, those named right.
    """
    scores, colours = verdicts(judge, images)
    truth = asked(scenes)
    found = scores >= judge.thresholds.numpy()
    right = total = 0
    for n, scene in enumerate(scenes):
        for name, colour in zip(scene.subjects, scene.colours, strict=True):
            at = SUBJECTS.index(name)
            if colour is not None and found[n, at]:
                right += COLOUR_LIST[colours[n, at, :-1].argmax()] == colour
                total += 1
    return {
        "decisions": float((found == truth).mean()),
        "shown": float(found[truth].mean()),
        "absent": float((~found)[~truth].mean()),
        "exact": float((found == truth).all(axis=1).mean()),
        "colour": right / max(1, total),
    }


def measure(folder: Path, vae: AutoencoderKL, *, set_thresholds: bool) -> None:
    """Measure `model` on sets that it never saw, with new thresholds if asked; write `figures.json`."""
    judge = Judge.load(folder / "model")
    sources = {
        "calibration": (GlyphBox(calibration_glyphs()), CALIBRATION_SEED),
        "test": (GlyphBox(generator_glyphs()), TEST_SEED),
    }
    results = {}
    for name, (box, seed) in sources.items():
        scenes = [draw_scene(box, seed, i, held_out=False) for i in range(1200)]
        images = np.stack([scene.image for scene in scenes])
        soft = to_tensor(through(vae, images))
        if name == "calibration" and set_thresholds:
            scores, _ = verdicts(judge, soft)
            truth = asked(scenes)
            thresholds = drawn_together(even_thresholds(scores, truth))
            judge.thresholds.copy_(torch.from_numpy(thresholds))
            judge.save(folder / "model")
        results[name] = figures(judge, scenes, to_tensor(images))
        results[f"{name}, through the autoencoder"] = figures(judge, scenes, soft)
    results["thresholds"] = dict(zip(SUBJECTS, judge.thresholds.tolist(), strict=True))
    (folder / "figures.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def main() -> None:
    """Train, or go on with, the judge; calibrate or measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--vae", type=Path, default=Path(source_of("stickers")) / "vae")
    parser.add_argument("--weights", type=Path, help="an exported judge, to go on from")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument(
        "--measure", action="store_true", help="as --calibrate, with the thresholds as they are"
    )
    arguments = parser.parse_args()
    use_one_thread()
    folder, vae = arguments.runs / "judge", load_vae(arguments.vae)
    if arguments.calibrate or arguments.measure:
        measure(folder, vae, set_thresholds=arguments.calibrate)
        return

    torch.manual_seed(0)
    judge = Judge.load(arguments.weights).train() if arguments.weights else Judge(SUBJECTS, list(COLOURS))
    judge.to(memory_format=torch.channels_last)
    optimiser = Muon(judge.parameters(), lr=arguments.rate)
    average = Average([judge], decay=0.98)
    box = JostledBox(judge_glyphs())
    batch = arguments.batch

    def take_step(n: int) -> dict[str, float]:
        for group in optimiser.param_groups:
            group["lr"] = arguments.rate * warmup_cosine(n, arguments.steps, warmup=30)
        indices = range(n * batch, (n + 1) * batch)
        scenes = [draw_scene(box, TRAIN_SEED, i, held_out=False) for i in indices]
        truth = [labels(scene) for scene in scenes]
        subjects, colours = (torch.from_numpy(np.stack(part)) for part in zip(*truth, strict=True))
        pictures = np.stack([scene.image for scene in scenes])
        pictures[::3] = through(vae, pictures[::3])
        rng = np.random.default_rng((TRAIN_SEED, n))
        images = softened(distorted(to_tensor(pictures), rng), rng)
        subject_logits, colour_logits = judge.cells(images)
        subject_loss = F.cross_entropy(subject_logits, subjects)
        colour_loss = F.cross_entropy(colour_logits, colours)
        optimiser.zero_grad(set_to_none=True)
        (subject_loss + 0.3 * colour_loss).backward()
        optimiser.step()
        average.update()
        return {"subject": subject_loss.item(), "colour": colour_loss.item()}

    def on_save(_: int) -> None:
        average.swap()
        exported = middle(judge, Judge.load(arguments.weights)) if arguments.weights else judge
        exported.save(folder / "model")
        average.swap()

    state = {"judge": judge, "optimiser": optimiser, "average": average}
    train(folder, state, take_step, arguments.steps, on_save, weights=arguments.weights)


if __name__ == "__main__":
    main()

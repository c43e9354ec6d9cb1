"""Measures a generator: does it draw what it is asked for, and does its attention mean it?

`python -m training.evaluate WHAT --model FOLDER` with WHAT one of

- `attention`: the cross-attention on held-out pairs over the first half of the steps,
- `masked`: whether a patch draws what it attends to, each half of the picture seeing one subject alone,
- `singles`: one subject, present and in the right colour,
- `tuning`, `wide`, `final`: pairs of subjects, plain and excited, from the same noise.

All with the steps, scheduler and guidance of the model. Prompts are in `data/evaluation.json`; the tuning
prompts and seeds choose step sizes and are never part of a final figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from attend_excite import AttendAndExcite, Generation, Model, Recipe, StableDiffusion, load
from attend_excite.benchmark.statistics import mean
from attend_excite.models.catalogue import source_of
from attend_excite.models.judge import TOP_CELLS, Judge, pixels
from training.glyphs import COLOURS, SUBJECTS, read_data
from training.grounding import KeepMaps
from training.judge import COLOUR_LIST
from training.loop import use_one_thread, write_atomically
from training.sheets import save_sheet
from training.words import token_positions

PROMPTS = read_data("evaluation.json")
FIRST_SEED = {"attention": 100, "masked": 300, "singles": 200, "tuning": 1000, "wide": 1000, "final": 0}
STICKER_CHANCE = 0.3  # a cell whose chance of the subject is above this belongs to it


def named(prompt: str) -> list[tuple[str, str | None]]:
    """The (subject, colour) pairs that a prompt asks for."""
    words = prompt.split()
    return [
        (word, words[i - 1] if words[i - 1] in COLOURS else None)
        for i, word in enumerate(words)
        if word in SUBJECTS
    ]


@torch.no_grad()
def judged(judge: Judge, images: list[Image.Image], prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """Of N images of one prompt, N x K each: whether its subjects are there, and whether
    they also have the colours that the prompt names (any, where it names none)."""
    verdict = judge(pixels(images))
    present = verdict.scores >= judge.thresholds
    there, right = [], []
    for subject, colour in named(prompt):
        at = SUBJECTS.index(subject)
        # "own" is no answer here: a red apple in its own colour is a red apple.
        seen = verdict.colours[:, at, :-1].argmax(dim=1)
        fits = seen == COLOUR_LIST.index(colour) if colour else torch.ones(len(images)).bool()
        there.append(present[:, at])
        right.append(present[:, at] & fits)
    return torch.stack(there, dim=1).numpy(), torch.stack(right, dim=1).numpy()


def picture(image: Image.Image) -> np.ndarray:
    """An image as sheets want it."""
    return np.asarray(image.convert("RGB"))


@torch.no_grad()
def attention_figures(model: Model, judge: Judge, seeds: range) -> Iterator[dict[str, float]]:
    """For every subject of every held-out prompt and seed that was drawn: its token's
    peak, whether the peak lies on its sticker, and what the padding holds."""
    for prompt in PROMPTS["attention"]:
        result = model.generate(prompt, method=StableDiffusion(), seeds=seeds, maps=True, progress=False)
        there, _ = judged(judge, result.images, prompt)
        cells = judge.cells(pixels(result.images))[0].softmax(dim=1)
        # The first <eot> belongs to the prompt, what follows is padding.
        first_padding = len(model.tokenizer(prompt).input_ids)
        for k, (subject, _) in enumerate(named(prompt)):
            maps = result.maps[subject].values[:, : model.steps // 2]
            sides = maps.shape[-2:]
            sticker = torch.nn.functional.interpolate(
                cells[:, 1 + SUBJECTS.index(subject), None], sides, mode="bilinear"
            )[:, 0]
            for n in np.flatnonzero(there[:, k]):
                peaks = maps[n].flatten(1)
                values, places = peaks.max(dim=1)
                on = sticker[n].flatten()[places] > STICKER_CHANCE
                found = {
                    "peak": values.mean().item(),
                    "peak above 0.25": (values > 0.25).float().mean().item(),
                    "peak on its sticker": on.float().mean().item(),
                }
                if model.family.joint is None:  # which keeps no maps of it
                    padding = result.maps.values[n, : model.steps // 2, ..., first_padding:].sum(dim=-1)
                    found["held by padding"] = padding.mean().item()
                yield found


def phrase(tokenizer: CLIPTokenizer, prompt: str, subject: str) -> Tensor:
    """T bool: <sot> and the tokens of a subject, its colour and its article."""
    words = prompt.split()
    positions = token_positions(tokenizer, prompt)
    last = words.index(subject)
    first = last - 1 - (words[last - 1] in COLOURS)
    seen = torch.zeros(tokenizer.model_max_length, dtype=torch.bool)
    seen[[0, *itertools.chain(*positions[first : last + 1])]] = True
    return seen


def halves(left: Tensor, right: Tensor) -> dict[int, Tensor]:
    """`KeepMaps`' masks for one image whose halves see the tokens `left` and `right` alone, and for the pass
    without a caption before it, which sees all: by the number of patches, 2 x patches x T bool."""
    allowed = {}
    for side in (16, 8, 4):
        row = torch.where(torch.arange(side)[:, None] < side // 2, left, right)
        square = row.repeat(side, 1)
        allowed[side * side] = torch.stack([torch.ones_like(square), square])
    return allowed


@torch.no_grad()
def masked_figures(model: Model, judge: Judge, seeds: range, sheet: Path) -> dict[str, float]:
    """How often both subjects of a pair are drawn, each in the half of the picture that may attend to it,
    and how often a half holds its own subject rather than the other's where it holds one of them."""
    if model.family.joint is not None:
        raise SystemExit("masks are for cross-attention: this model's image and text share theirs")
    pipeline = model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.set_attn_processor(KeepMaps(None))
    both, own, shown, captions = [], [], [], []
    for prompt in PROMPTS["attention"]:
        pair = [subject for subject, _ in named(prompt)]
        phrases = [phrase(model.tokenizer, prompt, subject) for subject in pair]
        for turn in (slice(None), slice(None, None, -1)):
            subjects, images = pair[turn], []
            allowed = {"allowed": halves(*phrases[turn])}
            for seed in seeds:
                noise = torch.Generator().manual_seed(seed)
                images += pipeline(
                    prompt, num_inference_steps=model.steps, generator=noise, cross_attention_kwargs=allowed
                ).images
            seen = pixels(images)
            # As the judge sees them: also mirrored, and turned back.
            mirrored = judge.cells(seen.flip(-1))[0].softmax(dim=1).flip(-1)
            chances = (judge.cells(seen)[0].softmax(dim=1) + mirrored) / 2
            kinds = chances[:, [1 + SUBJECTS.index(subject) for subject in subjects]]
            # images x subjects x halves: the mean of the best cells.
            scores = kinds.unflatten(-1, (2, -1)).permute(0, 1, 3, 2, 4).flatten(3)
            scores = scores.topk(TOP_CELLS, dim=-1).values.mean(dim=-1)
            limits = judge.thresholds[[SUBJECTS.index(subject) for subject in subjects]]
            there = scores >= limits[:, None]
            both += there.diagonal(dim1=1, dim2=2).all(dim=1).tolist()
            drawn = there.any(dim=1)
            own += (scores.argmax(dim=1) == torch.arange(2))[drawn].tolist()
            shown += [picture(image) for image in images]
            captions += [" | ".join(subjects)] * len(images)
    save_sheet(sheet, shown, captions, columns=2 * len(seeds))
    return {
        "both in their halves": float(np.mean(both)),
        "a half's own where it holds one": float(np.mean(own)),
        "pictures": len(both),
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of one value a prompt."""
    estimate = mean(values)
    return estimate.low, estimate.high


def shift(result: Generation) -> float:
    """The median relative size of an update of the latents."""
    shifts = [u.shift for trace in result.trace for step in trace.steps for u in step.updates]
    return float(np.median(shifts)) if shifts else 0.0


def pair_figures(
    model: Model,
    judge: Judge,
    prompts: dict[str, list[str]],
    seeds: range,
    recipes: dict[str, Recipe],
    sheet: Path,
) -> dict[str, dict]:
    """Neglect (images lacking a subject) per subset, plain and under each recipe.

    `sheet` shows a row a prompt: its seeds plain, then its seeds under each recipe.
    """
    methods = {"plain": StableDiffusion()}
    methods |= {name: AttendAndExcite(recipe=recipe) for name, recipe in recipes.items()}
    neglect: dict[str, dict[str, list[float]]] = {name: {} for name in methods}
    whole: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    both_right: dict[str, list[float]] = {name: [] for name in methods}
    shifts: dict[str, list[float]] = {name: [] for name in methods}
    shown, captions = [], []
    for subset, texts in prompts.items():
        for prompt in texts:
            for name, method in methods.items():
                result = model.generate(prompt, method=method, seeds=seeds, progress=False)
                there, right = judged(judge, result.images, prompt)
                neglect[name].setdefault(subset, []).append(1 - there.all(axis=1).mean())
                whole[name].append(there.all(axis=1))
                both_right[name].append(right.all(axis=1).mean())
                shifts[name].append(shift(result))
                shown += [picture(image) for image in result.images]
                captions += [f"{name}: {prompt}"] * len(seeds)
    save_sheet(sheet, shown, captions, columns=len(methods) * len(seeds))
    figures = {}
    for name in methods:
        everything = np.concatenate([np.array(v) for v in neglect[name].values()])
        before, after = np.concatenate(whole["plain"]), np.concatenate(whole[name])
        figures[name] = {
            "neglect": {subset: float(np.mean(v)) for subset, v in neglect[name].items()},
            "neglect of all": float(everything.mean()),
            "95 % interval": interval(everything),
            "mended": f"{(after & ~before).sum()} of {(~before).sum()}",
            "spoiled": f"{(before & ~after).sum()} of {before.sum()}",
            "both present in the right colours": float(np.mean(both_right[name])),
            "median relative shift": float(np.mean(shifts[name])),
        }
    return figures


def single_figures(model: Model, judge: Judge, seeds: range, sheet: Path) -> dict[str, float]:
    """How often a single subject is present, and present in the colour asked for."""
    there, right, shown, captions = [], [], [], []
    for prompt in PROMPTS["singles"]:
        result = model.generate(prompt, method=StableDiffusion(), seeds=seeds, progress=False)
        found, fits = judged(judge, result.images, prompt)
        there += list(found[:, 0])
        right += list(fits[:, 0]) if named(prompt)[0][1] else []
        shown += [picture(image) for image in result.images]
        captions += [f"{prompt}{'' if ok else ' (?)'}" for ok in fits[:, 0]]
    save_sheet(sheet, shown, captions, columns=12)
    return {"present": float(np.mean(there)), "in the right colour": float(np.mean(right))}


def main() -> None:
    """Measure one thing and write it to `runs/evaluation`, by the model's name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=list(FIRST_SEED))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--judge", type=Path, default=source_of("stickers-judge"))
    parser.add_argument("--seeds", type=int, default=2, help="images a prompt")
    parser.add_argument(
        "--step-sizes",
        type=float,
        nargs="*",
        default=[],
        help="official recipe with these step sizes, besides the model's own",
    )
    parser.add_argument(
        "--change", nargs="*", default=[], help="the model's recipe with these changes, each as JSON"
    )
    parser.add_argument("--prompts", type=int, default=None, help="only so many a subset")
    arguments = parser.parse_args()
    use_one_thread()

    what, folder = arguments.what, arguments.runs / "evaluation"
    model, judge = load(arguments.model, device="cpu"), Judge.load(arguments.judge)
    seeds = range(FIRST_SEED[what], FIRST_SEED[what] + arguments.seeds)
    name = f"{what}-{arguments.model.resolve().name}"
    sheet = folder / f"{name}.png"
    if what == "attention":
        rows = list(attention_figures(model, judge, seeds))
        figures = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        figures["subjects drawn"] = len(rows)
    elif what == "masked":
        figures = masked_figures(model, judge, seeds, sheet)
    elif what == "singles":
        figures = single_figures(model, judge, seeds, sheet)
    else:
        official = Recipe.named("official")
        recipes = {f"step {s:g}": replace(official, step_size=s) for s in arguments.step_sizes}
        for change in arguments.change:
            values = {"base": "recommended", **json.loads(change)}
            recipes[change] = Recipe.from_dict(values, model.recipe)
        recipes = recipes or {"official": official, "recommended": model.recipe}
        prompts = {name: texts[: arguments.prompts] for name, texts in PROMPTS[what].items()}
        figures = pair_figures(model, judge, prompts, seeds, recipes, sheet)
    asked = {"model": str(arguments.model), "seeds": arguments.seeds, "prompts a subset": arguments.prompts}
    text = json.dumps(asked | figures, indent=2) + "\n"
    write_atomically(folder / f"{name}.json", lambda path: path.write_text(text))
    print(text)


if __name__ == "__main__":
    main()

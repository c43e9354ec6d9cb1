"""Draw the pictures of the docs: docs/make_pictures.py gallery, methods, excite, explain, opening, web.

`opening` looks for what the web page opens with, and writes it into the package's data: of the benchmark's
prompts in their order the first where one of the plain pictures of the seeds 0 to 3 lacks a subject by the
bundled judge. So it is chosen by what the plain model does, whatever becomes of it with `excite`, and all
four seeds are shown. Run it again whenever the weights of `stickers` change, and `web` after it, which
takes pictures of the page with Chromium. The gallery of another model has its name in the file's.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import combinations, product
from pathlib import Path

from PIL import Image

from attend_excite import AttendAndExcite, Generation, Model, StableDiffusion, load
from attend_excite.benchmark.prompt_sets import draw_set
from attend_excite.benchmark.prompts import one, paper_prompts
from attend_excite.explain import curves_figure, evolution_figure, maps_figure
from attend_excite.methods import METHODS, method_named
from attend_excite.sheets import PAPER, comparison_sheet
from attend_excite.subjects import parse
from attend_excite.verdict import verdicts

HERE = Path(__file__).parent
SEEDS = range(4)

# The prompts of the paper's Figure 5.
METHODS_PROMPTS = (
    "a cat and a dog",
    "a turtle and a yellow bowl",
    "a frog and a pink bench",
    "a red bench and a yellow clock",
)

WORDS = json.loads(files("attend_excite").joinpath("data/benchmark.json").read_text(encoding="utf-8"))


def gallery_prompts() -> list[str]:
    """Two prompts of each of the benchmark's subsets, drawn by a random generator with seed 0."""
    draw = random.Random(0)
    things = [thing for thing in WORDS["objects"] if thing not in WORDS["worn"]]
    animals = draw.sample(list(combinations(WORDS["animals"], 2)), 2)
    mixed = draw.sample(list(product(WORDS["animals"], things)), 2)
    objects = draw.sample(list(combinations(things, 2)), 2)
    colours = iter(draw.choices(WORDS["colours"], k=6))
    return (
        [f"{one(first)} and {one(other)}" for first, other in animals]
        + [f"{one(animal)} and a {next(colours)} {thing}" for animal, thing in mixed]
        + [f"a {next(colours)} {first} and a {next(colours)} {other}" for first, other in objects]
    )


def grid(drawn: Mapping[str, Generation], subtitle: str, columns: int) -> Image.Image:
    """One comparison sheet a prompt, `columns` side by side, at half their size."""
    sheets = []
    prompts = drawn["attend-excite"].prompts
    for start in range(0, len(prompts), len(SEEDS)):
        rows = {label: generation.images[start : start + len(SEEDS)] for label, generation in drawn.items()}
        sheets.append(comparison_sheet(prompts[start], subtitle, rows, list(SEEDS)))
    width, height = (max(sizes) for sizes in zip(*(sheet.size for sheet in sheets), strict=True))
    whole = Image.new("RGB", (columns * width, -(-len(sheets) // columns) * height), PAPER)
    for index, sheet in enumerate(sheets):
        whole.paste(sheet, (index % columns * width, index // columns * height))
    return whole.reduce(2)


def explain(model: Model, steps: int) -> None:
    """The figures of one picture, with and without."""
    methods = {"plain": StableDiffusion(), "Attend-and-Excite": AttendAndExcite()}
    runs = {
        label: model.generate("a lion and a monkey", method=method, steps=steps, maps=True)
        for label, method in methods.items()
    }
    subtitle = f"{model.name}, seed 0, {steps} steps"
    save(HERE / "explain" / "maps.webp", maps_figure(runs, subtitle=subtitle))
    evolution = evolution_figure(runs["Attend-and-Excite"], subtitle=f"Attend-and-Excite, {subtitle}")
    save(HERE / "explain" / "evolution.webp", evolution.reduce(2))
    path = HERE / "explain" / "curves.webp"
    curves_figure(runs, model.recipe, subtitle=subtitle).savefig(path, dpi=100)
    print(f"{path.name}: {path.stat().st_size // 1024} kB")


def opening(model: Model, steps: int) -> None:
    """What the web page opens with: see above."""
    excite = method_named("excite")
    methods = {f"{model.name}, plain": StableDiffusion(), excite.title: excite}
    plain, _ = methods.values()
    for prompt in paper_prompts():
        run = model.generate(prompt.text, method=plain, seeds=SEEDS, steps=steps)
        parsed = parse(prompt.text, model.tokenizer)
        if not all(all(verdict.values()) for verdict in verdicts(run.images, parsed, model.name)):
            break
    else:
        raise SystemExit("the plain model lacks nothing: choose an opening by another rule")
    seen, data = {}, Path(str(files("attend_excite"))) / "data"
    for row, (label, method) in enumerate(methods.items()):
        run = model.generate(prompt.text, method=method, seeds=SEEDS, steps=steps)
        for seed, image in zip(SEEDS, run.images, strict=True):
            save(data / f"opening-{row}-{seed}.webp", image)
        seen[label] = [dict(verdict) for verdict in verdicts(run.images, parsed, model.name)]
    path = data / "examples.json"
    examples = json.loads(path.read_text(encoding="utf-8"))
    examples["opening"] = {
        "model": model.name,
        "prompt": prompt.text,
        "method": excite.name,
        "seeds": list(SEEDS),
        "steps": steps,
        "verdicts": seen,
    }
    prompts = ",\n".join(f"    {json.dumps(example)}" for example in examples["prompts"])
    told = json.dumps(examples["opening"], indent=2).replace("\n", "\n  ")
    path.write_text(f'{{\n  "opening": {told},\n  "prompts": [\n{prompts}\n  ]\n}}\n', encoding="utf-8")
    print(f"{prompt.text}: {seen}")


def web() -> None:
    """The web page with what it opens with: drawn, on a desktop; and on a phone, in the dark."""
    from playwright.sync_api import sync_playwright

    from attend_excite.app.page import serving

    with serving(["stickers"]) as served, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for name, scheme, size in (("desktop", "light", (1360, 900)), ("phone", "dark", (390, 844))):
            viewport = {"width": size[0], "height": size[1]}
            page = browser.new_page(viewport=viewport, color_scheme=scheme)
            page.goto(served.local_url)
            page.locator("#ae-draw").click()
            page.locator("#ae-maps img").first.wait_for()
            page.wait_for_timeout(1000)
            whole = Image.open(io.BytesIO(page.screenshot(full_page=name == "desktop")))
            save(HERE / f"web-{name}.webp", whole.convert("RGB"))


def save(path: Path, picture: Image.Image) -> None:
    picture.save(path, quality=80, method=6)
    print(f"{path.name}: {path.stat().st_size // 1024} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", choices=("gallery", "methods", "excite", "explain", "opening", "web"))
    parser.add_argument("--model", default="stickers", help="name, folder or Hub id")
    parser.add_argument("--steps", type=int, help="denoising steps; the model's own number by default")
    arguments = parser.parse_args()
    if arguments.picture == "web":
        web()
        return
    if arguments.picture != "gallery" and arguments.model != "stickers":
        parser.error("of other models than stickers there is a gallery alone")
    model = load(arguments.model)
    steps = arguments.steps or model.steps
    if arguments.picture == "explain":
        explain(model, steps)
        return
    if arguments.picture == "opening":
        opening(model, steps)
        return
    prompts: Sequence[str] = METHODS_PROMPTS
    names: Sequence[str] = tuple(METHODS)
    path = HERE / "methods" / "sheet.webp"
    if arguments.picture == "gallery":
        name = "gallery" if model.name == "stickers" else f"gallery-{Path(model.name).name}"
        prompts, path = gallery_prompts(), HERE / f"{name}.webp"
        names = ("stable-diffusion", "attend-excite", "excite")
    elif arguments.picture == "excite":
        # Another seed than those of the tuning prompts and of the comparison.
        drawn_sets = (draw_set(name, 2, seed=3) for name in ("three-subjects", "swapped-colours"))
        prompts = [prompt.text for drawn in drawn_sets for prompt in drawn]
        names, path = ("stable-diffusion", "attend-excite", "excite"), HERE / "methods" / "excite.webp"

    drawn = {
        # The bundled model's own pictures are not Stable Diffusion's.
        "plain" if name == "stable-diffusion" else name: model.generate(
            list(prompts), method=METHODS[name](), seeds=SEEDS, steps=steps
        )
        for name in names
    }
    save(path, grid(drawn, f"{model.name}, {steps} steps", columns=2))


if __name__ == "__main__":
    main()

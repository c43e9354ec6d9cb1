"""`attend-excite explain`: why a picture came out as it did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from attend_excite.cli.messages import MESSAGES, failures_as_sentences, plain, quieten_libraries, warn

if TYPE_CHECKING:
    from PIL import Image


def explain(
    picture: Annotated[Path, typer.Argument(help="A PNG that `attend-excite generate` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures.", show_default="PICTURE_explained")
    ] = None,
    animation: Annotated[
        Literal["webp", "gif"], typer.Option(help="What the animation is written as.")
    ] = "webp",
    method: Annotated[
        str | None, typer.Option(help="A method of your own that drew it, as MODULE:NAME.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, mps, …", show_default="where the picture was drawn, if it is here"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Draw a picture again with and without Attend-and-Excite, and show what each word was attended to."""
    with failures_as_sentences():
        from attend_excite.cli.summary import RESULTS, print_json

        quieten_libraries()
        out = out or picture.with_name(f"{picture.stem}_explained")
        files = _explained(picture, out, animation, method, device)
        if as_json:
            print_json({name: str(path) for name, path in files.items()})
        else:
            for name, path in files.items():
                RESULTS.print(plain(f"{name}: {path}"))


def _explained(
    picture: Path, out: Path, animation: str, method: str | None, device: str | None
) -> dict[str, Path]:
    """The files that were written, by what they show."""
    from attend_excite.cli.drawing import Request, generations, method_label, prepare, settings_label
    from attend_excite.explain import (
        animation_frames,
        curves_figure,
        evolution_figure,
        maps_figure,
        save_animation,
    )
    from attend_excite.files import written_whole
    from attend_excite.guidance.schedule import Recipe
    from attend_excite.metadata import read_origin, write_png
    from attend_excite.methods.own import find_method

    origin = read_origin(picture, None if method is None else find_method(method))
    # A picture whose method knows no subjects is explained by the one that nursing would have made.
    drawn_by = origin.settings.method
    if drawn_by.attends_to_prompt and not drawn_by.uses_subjects:
        method = "attend-excite"
    plan = prepare(Request(out, source=picture, method=method, device=device, compare=True, maps=True))
    runs = {method_label(settings): result for settings, _, result in generations(plan)}
    image = plan.batches[0].index(origin.seed)
    if not _is_among(picture, [run.images[image] for run in runs.values()]):
        warn(f"the model now draws another picture than '{picture}': what is explained is the new one")

    nursed = plan.runs[-1]
    subtitle = f"seed {origin.seed} · {settings_label(nursed)}"
    files = {
        "maps": out / "maps.png",
        "evolution": out / "evolution.png",
        "curves": out / "curves.png",
        "animation": out / f"animation.{animation}",
    }
    with MESSAGES.status("writing"):
        write_png(files["maps"], maps_figure(runs, image, subtitle=subtitle))
        label, run = list(runs.items())[-1]
        write_png(files["evolution"], evolution_figure(run, image, subtitle=f"{label} · {subtitle}"))
        recipe = getattr(nursed.method, "recipe", None)
        if isinstance(recipe, str):
            recipe = Recipe.named(recipe, plan.model.recipe)
        with written_whole(files["curves"]) as partial:
            curves_figure(runs, recipe, image, subtitle=subtitle).savefig(partial)
        save_animation(files["animation"], animation_frames(runs, image, subtitle=subtitle))
    return files


def _is_among(path: Path, images: Sequence[Image.Image]) -> bool:
    """Whether the picture in a file is one of these to the bit."""
    from PIL import Image

    with Image.open(path) as picture:
        return any(picture.size == image.size and picture.tobytes() == image.tobytes() for image in images)

"""`attend-excite explain`: why a picture came out as it did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from attend_excite.cli.messages import (
    MESSAGES,
    failures_as_sentences,
    given_path,
    plain,
    quieten_libraries,
    warn,
)
from attend_excite.cli.options import AsJson, on_device

if TYPE_CHECKING:
    from PIL import Image


_SHOWN = {
    "maps": "where each subject was attended to at the last step",
    "evolution": "the same from the first step to the last",
    "curves": "how much, step by step, and what nursing did",
    "animation": "the maps as a film",
}


def explain(
    picture: Annotated[
        Path, typer.Argument(help="A PNG that `attend-excite generate` wrote.", parser=given_path)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the pictures.",
            show_default="PICTURE_explained",
            parser=given_path,
            metavar="PATH",
        ),
    ] = None,
    animation: Annotated[Literal["webp", "gif"], typer.Option(help="Format of the animation.")] = "webp",
    method: Annotated[
        str | None, typer.Option(help="A method of your own that drew it, as MODULE:NAME.")
    ] = None,
    device: Annotated[str | None, on_device("the picture's device, if available")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw a picture again with and without Attend-and-Excite; show where each subject was attended to."""
    with failures_as_sentences():
        from attend_excite.cli.summary import RESULTS, print_json

        quieten_libraries()
        out = out or picture.with_name(f"{picture.stem}_explained")
        files, sentences = _explained(picture, out, animation, method, device)
        if as_json:
            print_json({name: str(path) for name, path in files.items()})
        else:
            for sentence in sentences:
                RESULTS.print(sentence, markup=False, highlight=False)
            for name, path in files.items():
                RESULTS.print(plain(f"{name}: {path} ({_SHOWN[name]})"))


def _explained(
    picture: Path, out: Path, animation: str, method: str | None, device: str | None
) -> tuple[dict[str, Path], list[str]]:
    """The files that were written, by what they show, and what came out in words."""
    from attend_excite.cli.drawing import Request, generations, method_label, prepare, settings_label
    from attend_excite.explain import (
        account,
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
    kept = _pixels(picture)  # What is damaged shows before anything is drawn.
    # A picture whose method knows no subjects is explained by the one that nursing would have made.
    drawn_by = origin.settings.method
    if drawn_by.attends_to_prompt and not drawn_by.uses_subjects:
        method = "attend-excite"
    plan = prepare(Request(out, source=picture, method=method, device=device, compare=True, maps=True))
    runs = {method_label(settings): result for settings, _, result in generations(plan)}
    image = plan.batches[0].index(origin.seed)
    if kept not in [_comparable(run.images[image]) for run in runs.values()]:
        threads = "" if origin.other_threads is None else ", by the other number of threads"
        warn(
            f"what is drawn now is not '{picture}' to the bit{threads}: what is explained is the new picture"
        )

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
    return files, account(runs, image)


def _pixels(path: Path) -> tuple[Any, ...]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return _comparable(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"the picture '{path}' is damaged: {error}") from error


def _comparable(picture: Image.Image) -> tuple[Any, ...]:
    return picture.size, picture.mode, picture.tobytes()

"""The command line: `attend-excite generate`, `tokens`, `models`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from attend_excite.cli.bench import bench
from attend_excite.cli.benchmark import benchmark
from attend_excite.cli.explain import explain
from attend_excite.cli.messages import (
    end_tidily,
    failures_as_sentences,
    given_path,
    quieten_imports,
    quieten_libraries,
)
from attend_excite.cli.options import DRAWING, MACHINE, AsJson, Guidance, Steps, on_device
from attend_excite.cli.study import study
from attend_excite.cli.study_analysis import analyse, simulate
from attend_excite.cli.verify import verify
from attend_excite.cli.web import web_page
from attend_excite.cli.words import check_prompt, check_subjects, check_text
from attend_excite.guidance.recipes import method_recipes, recipe_names
from attend_excite.schedulers import scheduler_names

# torch and diffusers take seconds to import: only commands that need them do, when they run.

app = typer.Typer(
    help="Draw everything that a prompt asks for: Attend-and-Excite.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(benchmark, name="benchmark")
app.command()(verify)
app.add_typer(study, name="study")
study.command()(analyse)
study.command()(simulate)
app.command()(bench)
app.command()(explain)
app.command("app")(web_page)

ModelName = Annotated[
    str | None,
    typer.Option(
        help="A name from `attend-excite models`, a folder in diffusers layout, a checkpoint in one "
        ".safetensors file or a Hub id.",
        show_default="stickers",
    ),
]
Subjects = Annotated[
    list[str] | None,
    typer.Option(
        "--subject",
        help="A word or phrase that must show, instead of the nouns; repeat for more. "
        '"frog=0.7" asks for less attention, --subject=-hat for as little as possible, and "cat#2" is the '
        "second cat.",
        show_default="the [bracketed] words, or the nouns",
    ),
]
PromptSyntax = Annotated[
    str | None,
    typer.Option(
        "--syntax",
        help="a1111: read (cat:1.3), \\[cat], BREAK and prompts of more than 75 tokens as A1111 does; "
        "the subjects are then the nouns, or named.",
        show_default="plain",
    ),
]
# A prompt without quotes: the commands say so.
_WORDS_BEHIND = {"allow_extra_args": True}
_OUTPUT = "Output"


def main() -> None:
    """Run the program."""
    quieten_imports()
    end_tidily()
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"attend-excite {version('attend-excite')}")
        raise typer.Exit


@app.callback()
def _program(
    _: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command(context_settings=_WORDS_BEHIND)
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help='What to draw: "a cat and a frog".')] = None,
    subject: Subjects = None,
    syntax: PromptSyntax = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Draw this picture again, with the settings in its PNG; other options override them.",
            parser=given_path,
            metavar="PATH",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Draw the seeds 0 to N-1.", metavar="N", show_default="1")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Draw this seed; repeat for more.")] = None,
    best: Annotated[
        int | None,
        typer.Option(
            help="Draw the seeds 0 to N-1 whole and keep the one picture that shows the most subjects, by "
            "the bundled judge: for the bundled models alone.",
            metavar="N",
        ),
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(
            help="Try N noises for each seed, each for the first steps alone, and draw the one of the lowest "
            "loss: for every model.",
            metavar="N",
            show_default="1",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="attend-excite, stable-diffusion (the plain model), composable, structure, reweight, "
            f"{', '.join(method_recipes())}, or one of your own as MODULE:NAME.",
            show_default="attend-excite",
            rich_help_panel=DRAWING,
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help="composable: the weight of a concept, repeat for each; reweight: the factor, -2 to 2.",
            show_default="composable: the guidance; reweight: 2",
            rich_help_panel=DRAWING,
        ),
    ] = None,
    phrase: Annotated[
        list[str] | None,
        typer.Option(
            help="structure: a noun phrase of the prompt; repeat for more.",
            show_default="those found",
            rich_help_panel=DRAWING,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help=f"Attend-and-Excite's numbers: recommended, {', '.join(recipe_names())}, or a .json file.",
            show_default="what the model recommends",
            rich_help_panel=DRAWING,
        ),
    ] = None,
    steps: Steps = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help=f"Another scheduler: {', '.join(scheduler_names())}.",
            show_default="the model's",
            rich_help_panel=DRAWING,
        ),
    ] = None,
    guidance: Guidance = None,
    negative: Annotated[
        str | None, typer.Option(help="The negative prompt.", rich_help_panel=DRAWING)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="In pixels: 512, or 768x512 (width x height).",
            show_default="the model's",
            rich_help_panel=DRAWING,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="A picture to begin from, drawn in its own size unless --size says another.",
            parser=given_path,
            metavar="PATH",
            rich_help_panel=DRAWING,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of that picture is made anew, above 0 to 1.",
            show_default="0.8",
            rich_help_panel=DRAWING,
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="A picture as large as that one, white where is drawn; the rest stays as it is.",
            parser=given_path,
            metavar="PATH",
            rich_help_panel=DRAWING,
        ),
    ] = None,
    model: ModelName = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA's .safetensors file, and its weight behind a colon; again for more.",
            metavar="FILE[:WEIGHT]",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    embedding: Annotated[
        list[Path] | None,
        typer.Option(
            help="A word learnt by textual inversion, in a .safetensors file whose name the prompt says; "
            "again for more.",
            metavar="FILE",
            parser=given_path,
            rich_help_panel=MACHINE,
        ),
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            help="A folder with another autoencoder, in diffusers layout.",
            metavar="FOLDER",
            parser=given_path,
            rich_help_panel=MACHINE,
        ),
    ] = None,
    device: Annotated[str | None, on_device(panel=MACHINE)] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16.",
            show_default="16 bits on CUDA, as the model is for; else float32",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            help="Pictures in one pass; auto: as many as fit in memory.",
            metavar="N",
            show_default="8",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    compile_model: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the model first. Meant for many pictures on a GPU; on a CPU it gains nothing.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also draw the plain model's pictures, and a sheet of both.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    maps: Annotated[
        bool,
        typer.Option(
            "--maps", help="Also write a sheet of each subject's attention.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the pictures.", rich_help_panel=_OUTPUT, parser=given_path, metavar="PATH"
        ),
    ] = Path("out"),
    as_json: AsJson = False,
) -> None:
    """Draw a prompt: one picture for each seed. Each PNG stores the settings that made it."""
    finished: list[Path] = []
    with failures_as_sentences(
        stopped=lambda: _stopped(finished, best),
        out_of_memory="out of memory: lower --batch-size or --size, or use a --dtype of 16 bits",
    ):
        check_prompt(prompt, context.args)
        check_text(negative, "the negative prompt")
        from attend_excite.cli.drawing import Request, draw
        from attend_excite.cli.summary import drawing_document, print_drawing, print_json

        quieten_libraries()
        request = Request(
            prompt=prompt,
            subjects=subject,
            syntax=syntax,
            model=model,
            seed_count=seeds,
            seeds=seed,
            best=best,
            best_of=best_of,
            method=method,
            weights=weight,
            phrases=phrase,
            recipe=recipe,
            steps=steps,
            scheduler=scheduler,
            guidance=guidance,
            size=size,
            negative=negative,
            image=image,
            strength=strength,
            mask=mask,
            loras=lora,
            embeddings=embedding,
            vae=vae,
            compare=compare,
            maps=maps,
            out=out,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            compile=compile_model,
            source=source,
        )
        drawing = draw(request, finished)
        if as_json:
            print_json(drawing_document(drawing))
        else:
            print_drawing(drawing)


def _stopped(finished: list[Path], best: int | None) -> str:
    """What is there of a drawing that was stopped."""
    if not finished and best is not None:
        return f"stopped before the best of {best} pictures was chosen: none is kept"
    if not finished:
        return "stopped before a picture was finished: there is none"
    count = "1 picture is" if len(finished) == 1 else f"{len(finished)} pictures are"
    return f"stopped: {count} finished, and kept in '{finished[0].parent}'"


@app.command(context_settings=_WORDS_BEHIND)
def tokens(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt to look at.")],
    model: ModelName = None,
    subject: Subjects = None,
    syntax: PromptSyntax = None,
    embedding: Annotated[
        list[Path] | None,
        typer.Option(
            help="A word learnt by textual inversion; again for more.", metavar="FILE", parser=given_path
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a prompt's tokens, the nouns found and the subjects chosen."""
    with failures_as_sentences():
        check_prompt(prompt, context.args)
        check_subjects(subject, prompt)
        from attend_excite.cli.summary import print_json, print_tokens, tokens_document
        from attend_excite.models import load_streams
        from attend_excite.subjects import checked_syntax, parse

        streams = load_streams("stickers" if model is None else model, embeddings=embedding or ())
        parsed = parse(prompt, streams, subject, checked_syntax(syntax))
        if as_json:
            print_json(tokens_document(parsed))
        else:
            print_tokens(parsed, streams)


@app.command()
def models() -> None:
    """List the models that have a short name."""
    with failures_as_sentences():
        from attend_excite.cli.summary import RESULTS, table
        from attend_excite.models import catalogue

        entries = table("name", "kind", "source", "what it is", "nursing tried on")
        for name, entry in catalogue().items():
            entries.add_row(name, entry.kind, entry.source, entry.summary, entry.tried)
        RESULTS.print(entries)

"""`attend-excite benchmark`: the paper's evaluation, from prompts to a report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer

from attend_excite.cli.messages import failures_as_sentences, given_path, plain, quieten_libraries
from attend_excite.cli.options import DRAWING, MACHINE, Guidance, Steps, on_device

benchmark = typer.Typer(help="The paper's evaluation: draw, score, report.", no_args_is_help=True)

_JUDGED_BY = "the bundled one for the bundled models, else the paper's"


@benchmark.command()
def run(
    out: Annotated[
        str, typer.Option(help="The run's folder, or an fsspec URL. Pictures in it are not drawn again.")
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A prompt a line, JSON with lists of prompts (the authors', SSD), JSON lines (GenEval), or "
            "CSV: prompt, subset, subjects.",
            show_default="the paper's 276",
            parser=given_path,
            metavar="PATH",
        ),
    ] = None,
    per_subset: Annotated[
        int | None, typer.Option(help="Take so many prompts of each subset, at random.", show_default="all")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Draw so many seeds of each prompt.", metavar="N")] = 4,
    first_seed: Annotated[
        int, typer.Option(help="The first of them. Tune on other seeds than those of the result.")
    ] = 0,
    system: Annotated[
        list[str] | None,
        typer.Option(
            help='A method, MODULE:NAME for one of your own, or "attend-excite RECIPE": a recipe\'s name, a '
            ".json file, or numbers, as step_size=10; behind any of them perhaps best_of=4, noises tried for "
            "each seed; again for each.",
            show_default="the five methods",
            rich_help_panel=DRAWING,
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Attend-and-Excite with one number of its recipe at several values: step_size=5,10,20.",
            show_default="none",
            rich_help_panel=DRAWING,
        ),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    model: Annotated[
        str,
        typer.Option(help="A name, a folder in diffusers layout or a Hub id.", rich_help_panel=MACHINE),
    ] = "stickers",
    device: Annotated[str | None, on_device(panel=MACHINE)] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(
            help="Number type of the weights.",
            show_default="16 bits on CUDA, as the model is for; else float32",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images in one pass.", rich_help_panel=MACHINE)] = 8,
    executor: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Draw in this process, or on a Ray cluster.", rich_help_panel=MACHINE),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Ray: number of workers.", show_default="one a GPU, or a CPU", rich_help_panel=MACHINE
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray: address of a cluster.", show_default="one is started here", rich_help_panel=MACHINE
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will cost; write nothing.")] = False,
) -> None:
    """Draw every prompt with every seed and system. If it is stopped, the same command goes on.

    The exit status is 1 if an image failed."""
    with failures_as_sentences(
        stopped="stopped: the same command goes on from here",
        out_of_memory="out of memory: lower --batch-size, or use a --dtype of 16 bits",
    ):
        from attend_excite.cli.benchmark_run import Request, draw_benchmark

        quieten_libraries()
        all_is_well = draw_benchmark(
            Request(
                out=out,
                prompts=prompts,
                per_subset=per_subset,
                seeds=range(first_seed, first_seed + seeds),
                systems=tuple(system or ()),
                sweeps=tuple(sweep or ()),
                steps=steps,
                guidance=guidance,
                model=model,
                device=device,
                dtype=dtype,
                batch_size=batch_size,
                executor=executor,
                workers=workers,
                address=address,
                dry_run=dry_run,
            )
        )
    if not all_is_well:
        raise typer.Exit(1)


@benchmark.command()
def prompts(
    out: Annotated[
        Path, typer.Option(help="The table to write, for run --prompts.", parser=given_path, metavar="PATH")
    ],
    chosen: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="two-subjects, three-subjects, four-subjects, look-alikes, swapped-colours; again for each.",
            show_default="three-subjects, four-subjects, swapped-colours",
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="Prompts of each set.", metavar="N")] = 100,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    things: Annotated[
        Path | None,
        typer.Option(
            help="What is drawn: a file with a name a line.",
            show_default="the paper's animals and objects",
            parser=given_path,
            metavar="PATH",
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help='The look-alikes: a file with a pair a line, "cat, dog".',
            show_default="none",
            parser=given_path,
            metavar="PATH",
        ),
    ] = None,
) -> None:
    """Write prompts that are drawn by a seed: several subjects, look-alikes, objects with swapped colours."""
    with failures_as_sentences():
        from attend_excite.benchmark.prompt_sets import (
            LOOK_ALIKES,
            SWAPPED,
            as_csv,
            draw_set,
            read_pairs,
            read_things,
        )
        from attend_excite.cli.summary import RESULTS
        from attend_excite.files import write_whole

        if not out.parent.is_dir():
            raise ValueError(f"there is no folder '{out.parent}' to write '{out.name}' to")
        if out.suffix != ".csv":
            raise ValueError(f"prompts are written as CSV: name the file '{out.stem}.csv', not '{out.name}'")
        if pairs is not None and chosen and LOOK_ALIKES not in chosen:
            raise ValueError(f"--pairs is for another set: add --set {LOOK_ALIKES}, or leave it out")
        usual = ["three-subjects", "four-subjects", SWAPPED, *([LOOK_ALIKES] if pairs else [])]
        named = None if things is None else read_things(things)
        alike = () if pairs is None else read_pairs(pairs)
        drawn = [
            prompt
            for name in dict.fromkeys(chosen or usual)
            for prompt in draw_set(name, count, seed=seed, things=named, pairs=alike)
        ]
        for text, count in Counter(prompt.text for prompt in drawn).items():
            if count > 1:
                raise ValueError(
                    f"'{text}' was drawn for two sets, and a table has each prompt once: give another "
                    "--seed, or draw the sets into tables of their own"
                )
        write_whole(out, as_csv(drawn))
        RESULTS.print(plain(f"{out}: {len(drawn)} prompts"))


@benchmark.command()
def score(
    run: Annotated[str, typer.Argument(help="The run's folder, or its URL.")],
    clip: Annotated[
        str | None,
        typer.Option(help="CLIP: image-text and text-text similarity.", show_default=_JUDGED_BY),
    ] = None,
    captioner: Annotated[
        str | None, typer.Option(help="BLIP: text-text similarity.", show_default=_JUDGED_BY)
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="A presence judge of sticker images.", show_default="the bundled one, for the bundled models"
        ),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            help="An open-vocabulary detector, as google/owlv2-base-patch16-ensemble.", show_default="none"
        ),
    ] = None,
    vqa: Annotated[
        str | None,
        typer.Option(help='A vision-language model, asked for its P("yes").', show_default="none"),
    ] = None,
    wording: Annotated[
        Literal["official", "paper"],
        typer.Option(help="How prompts are put into words: as in the authors' code, or in correct English."),
    ] = "official",
    real: Annotated[
        Path | None,
        typer.Option(
            help="A folder of real images for each subject: the upper bound.",
            show_default="none",
            parser=given_path,
            metavar="PATH",
        ),
    ] = None,
    device: Annotated[str | None, on_device()] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 32,
) -> None:
    """Judge the images that aren't judged yet. A judge is a short name, a folder or a Hub id; "none" leaves
    it out."""
    with failures_as_sentences(
        stopped="stopped: the same command goes on from here",
        out_of_memory="out of memory: lower --batch-size",
    ):
        from attend_excite.benchmark.score import real_images
        from attend_excite.cli.benchmark_score import score_benchmark

        quieten_libraries()
        if real is not None:
            real_images(real)  # A mistake shows before all images are judged.
        names = {"clip": clip, "captioner": captioner, "judge": judge, "detector": detector, "vqa": vqa}
        score_benchmark(run, names, wording, real, device, batch_size)


@benchmark.command()
def report(
    run: Annotated[str, typer.Argument(help="The run's folder, or its URL.")],
    out: Annotated[
        str | None, typer.Option(help="The report's folder, or its URL.", show_default="RUN/report")
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Another run to compare with.")] = None,
    study: Annotated[
        Path | None,
        typer.Option(
            help="The result of a user study, from attend-excite study analyse.",
            parser=given_path,
            metavar="PATH",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="The system that the others are compared with.", show_default="attend-excite, if it is there"
        ),
    ] = None,
    highlight: Annotated[
        str | None,
        typer.Option(
            help="The system that the report is about: it stands out, and is compared with the reference.",
            show_default="attend-excite, if it is there",
        ),
    ] = None,
) -> None:
    """Write the paper's tables and figures for a run as one page, and all numbers as files beside it."""
    with failures_as_sentences():
        from attend_excite.benchmark.report import write_report
        from attend_excite.cli.messages import MESSAGES
        from attend_excite.cli.summary import RESULTS

        quieten_libraries()
        folder = f"{run.rstrip('/')}/report" if out is None else out
        with MESSAGES.status("writing the report"):
            write_report(run, folder, other=compare, study=study, reference=reference, highlight=highlight)
        RESULTS.print(plain(f"{folder}/report.html"))

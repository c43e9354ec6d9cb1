"""Pictures that explain a run: where each subject was attended to, and what nursing did about it.

They are made of `Generation`s that kept their maps (`maps=True`). `runs` sets several side by side, a label
-> the generation: of the same prompts and seeds with different methods, the nursed one last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from attend_excite.files import written_whole
from attend_excite.generate import Generation
from attend_excite.guidance.schedule import Recipe
from attend_excite.sheets import INK, MUTED, evolution_sheet, fitted, maps_sheet, subject_colour, subject_name
from attend_excite.subjects import Prompt
from attend_excite.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EVOLUTION_COLUMNS = 8
_FRAME_MILLISECONDS, _LAST_FRAME_MILLISECONDS = 120, 2000
_BAND = "#e7e5e4"
_STYLE: Any = {
    "font.size": 10,
    "axes.edgecolor": "#a8a29e",
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.dpi": 150,
    "legend.frameon": False,
    "text.parse_math": False,  # prompts may have dollars in them
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def maps_figure(
    runs: Mapping[str, Generation], image: int = 0, step: int | None = -1, *, subtitle: str = ""
) -> Image.Image:
    """Each subject's map over the picture, a row a method (Figure 4).

    Each map is stretched from its own lowest to its highest attention, which stands below it: the map of a
    neglected subject shows where the little went that it got.

    Args:
        runs: see the module.
        image: its index in every generation.
        step: whose maps are shown; -1: the last (t = 0), as in the paper; None: the mean over the steps.
        subtitle: what else made the pictures.

    Raises:
        ValueError: the maps were not recorded, the pictures not decoded, or no run has subjects.
    """
    return _maps_sheet(runs, image, step, subtitle)


def animation_frames(
    runs: Mapping[str, Generation], image: int = 0, *, subtitle: str = ""
) -> list[Image.Image]:
    """A picture a step: each subject's map as it was then, over the finished picture.

    All maps of all frames share one scale, from 0 to the highest attention there is among them. The
    arguments and the errors are those of `maps_figure`.
    """
    highest = _highest(runs, image)
    last = len(next(iter(runs.values())).trace[image].steps) - 1
    return [
        _maps_sheet(
            runs, image, step, " · ".join(filter(None, (f"step {step} of {last}", subtitle))), highest
        )
        for step in range(last + 1)
    ]


def evolution_figure(run: Generation, image: int = 0, *, subtitle: str = "") -> Image.Image:
    """Each subject's map at eight steps from first to last, over the finished picture (Figure 3).

    All share one scale, from 0 to the highest attention there is among them. The arguments and the errors
    are those of `maps_figure`.
    """
    prompt = _prompt({"": run}, image)
    highest = _highest({"": run}, image)
    words = [run.maps.of_tokens(group.positions) for group in prompt.groups]
    last = len(run.trace[image].steps) - 1
    columns = min(_EVOLUTION_COLUMNS, last + 1)
    steps = [round(last * column / max(columns - 1, 1)) for column in range(columns)]
    heats = {
        f"step {step}": [word.heat_map(image, step, highest=highest) for word in words] for step in steps
    }
    return evolution_sheet(prompt, subtitle, run.images[image], heats)


def save_animation(path: str | Path, frames: Sequence[Image.Image]) -> None:
    """Write frames as a film without end: .webp, .gif, or what else of the kind Pillow writes.

    The last frame stays for two seconds.
    """
    durations = [_FRAME_MILLISECONDS] * (len(frames) - 1) + [_LAST_FRAME_MILLISECONDS]
    with written_whole(Path(path)) as partial:
        frames[0].save(partial, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def curves_figure(
    runs: Mapping[str, Generation], recipe: Recipe | None = None, image: int = 0, *, subtitle: str = ""
) -> Figure:
    """Each subject's attention step by step, and where a run was nursed also what nursing saw and did.

    The first panel has the highest value of each subject's map in the passes that denoise, all runs in one.
    The others are of the nursed run: the attention that the objective measures, which is re-weighed among
    the prompt's tokens and smoothed, and the loss, with a line a term where it is a sum. A step that was
    refined has a point an update.

    Args:
        runs: see the module.
        recipe: what the nursed run was nursed with: its thresholds are marked.
        image: its index in every generation.
        subtitle: what else made the pictures.

    Raises:
        ValueError: as `maps_figure`.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    prompt = _prompt(runs, image)
    nursed = [(label, run.trace[image]) for label, run in runs.items() if run.trace[image].losses]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 7.5) if nursed else (9, 3.4), layout="constrained")
        heights = [3, 3, 2] if nursed else [1]
        panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[
            :, 0
        ].tolist()
        figure.suptitle(prompt.text, x=0.01, ha="left", fontsize=15)
        figure.supxlabel(subtitle, x=0.01, ha="left", fontsize=9, color=MUTED)
        _draw_peaks(panels[0], runs, prompt, image)
        for label, trace in nursed[-1:]:
            _draw_measured(panels[1], label, trace, prompt)
            _draw_thresholds(panels[1], trace, prompt, recipe)
            _draw_losses(panels[2], trace)
            _mark_nursing(panels, trace)
        for panel in panels:
            low, high = panel.dataLim.intervaly
            # Attention, and losses but for those of an objective of one's own.
            if panel not in panels[2:] or (low >= 0 and high <= 1):
                panel.set_ylim(-0.03, 1.06)
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[-1].set_xlabel("denoising step")
    return figure


def account(runs: Mapping[str, Generation], image: int = 0) -> list[str]:
    """What the figures show, in sentences: each subject's highest attention in the end, and the nursing.

    The arguments and the errors are those of `maps_figure`.
    """
    sentences = []
    for group in _prompt(runs, image).groups:
        peaks = {
            label: float(run.maps.of_tokens(group.positions).at(image).max()) for label, run in runs.items()
        }
        told = ", ".join(f"{peak:.2f} ({label})" for label, peak in peaks.items())
        wanted = f", where at most {group.target:g} is wanted" if group.negated else ""
        sentences.append(f"{subject_name(group)}: highest attention at the last step {told}{wanted}")
    for label, run in runs.items():
        trace = run.trace[image]
        if not trace.losses:
            continue
        nursed = [step for step in trace.steps if step.updates]
        updates = [update for step in nursed for update in step.updates]
        negated = {group.text for group in _prompt(runs, image).groups if group.negated}
        last = {word: value for word, value in updates[-1].attention.items() if word not in negated}
        refined = f", refined at {', '.join(map(str, trace.refinements))}" if trace.refinements else ""
        told = (
            f"{label}: {sum(update.shift > 0 for update in updates)} updates in {len(nursed)} of "
            f"{len(trace.steps)} steps{refined}"
        )
        if last:
            least, word = min((value, word) for word, value in last.items())
            told += f"; when it ended, {word} was attended to least, with {least:.2f} as nursing measures it"
        sentences.append(told)
    return sentences


def _maps_sheet(
    runs: Mapping[str, Generation], image: int, step: int | None, subtitle: str, highest: float | None = None
) -> Image.Image:
    """With a `highest` the maps share that scale, and the pictures are of a size for many."""
    prompt = _prompt(runs, image)
    if not all(run.images for run in runs.values()):
        raise ValueError("the pictures were not decoded: generate with decode=True")
    rows, captions = {}, {}
    for label, run in runs.items():
        words = [run.maps.of_tokens(group.positions) for group in prompt.groups]
        picture = run.images[image] if highest is None else fitted(run.images[image])
        rows[label] = picture, [word.heat_map(image, step, highest=highest) for word in words]
        captions[label] = [f"highest {word.at(image, step).max():.2f}" for word in words]
    return maps_sheet(prompt, subtitle, rows, captions)


def _prompt(runs: Mapping[str, Generation], image: int) -> Prompt:
    """The prompt with its subjects, which the plain model's run does not have."""
    for run in runs.values():
        if run.prompts[image].groups:
            return run.prompts[image]
    raise ValueError("no run has subjects: give one whose method uses them, as Attend-and-Excite")


def _highest(runs: Mapping[str, Generation], image: int) -> float:
    groups = _prompt(runs, image).groups
    return max(
        float(run.maps.of_tokens(group.positions).values[image].max())
        for run in runs.values()
        for group in groups
    )


def _draw_peaks(panel: Axes, runs: Mapping[str, Generation], prompt: Prompt, image: int) -> None:
    panel.set_title("highest attention in the passes that denoise")
    styles = (("-", 4, 0.35), ("--", 1.5, 1), (":", 1.5, 1), ("-.", 1.5, 1))
    for number, (label, run) in enumerate(reversed(list(runs.items()))):
        line, width, alpha = styles[number % len(styles)]
        for index, group in enumerate(prompt.groups):
            peaks = run.maps.of_tokens(group.positions).values[image].amax(dim=(-2, -1)).tolist()
            name, colour = ", ".join(filter(None, (subject_name(group), label))), subject_colour(index)
            panel.plot(peaks, line, color=colour, linewidth=width, alpha=alpha, label=name)
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_measured(panel: Axes, label: str, trace: Trace, prompt: Prompt) -> None:
    panel.set_title(" · ".join(filter(None, ("attention as nursing measures it", label))))
    for index, group in enumerate(prompt.groups):
        colour = subject_colour(index)
        values = [update.attention[group.text] for step in trace.steps for update in step.updates]
        panel.plot(_places(trace), values, ".-", color=colour, label=subject_name(group))
        if group.negated or group.target < 1:
            panel.axhline(group.target, color=colour, linestyle=":")
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_thresholds(panel: Axes, trace: Trace, prompt: Prompt, recipe: Recipe | None) -> None:
    for step, plan in enumerate(recipe.plan(len(trace.steps)) if recipe else ()):
        if plan.threshold is None:
            continue
        for negated in {group.negated for group in prompt.groups}:
            level = 1 - plan.threshold if negated else plan.threshold
            panel.plot(step, level, "v" if negated else "^", color=INK, zorder=3)
            what, place = (f"≤ {level:g}", "top") if negated else (f"≥ {level:g}", "bottom")
            panel.annotate(what, (step, level), (6, 0), textcoords="offset points", va=place)


def _draw_losses(panel: Axes, trace: Trace) -> None:
    panel.set_title("loss")
    updates = [update for step in trace.steps for update in step.updates]
    panel.plot(_places(trace), [update.loss for update in updates], ".-", color=INK, label="loss")
    names = list(dict.fromkeys(name for update in updates for name in update.parts))
    for index, name in enumerate(names):
        # A term that doesn't count at a step leaves a gap there.
        values = [update.parts.get(name, float("nan")) for update in updates]
        panel.plot(_places(trace), values, ".--", color=subject_colour(index), linewidth=1, label=name)
    if names:
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _mark_nursing(panels: Sequence[Axes], trace: Trace) -> None:
    """A band for each refined step, with its further updates, and a line at the last altered step."""
    end = max(step.index for step in trace.steps if step.updates)
    for panel in panels:
        panel.axvline(end, color=MUTED, linewidth=1)
        for step in trace.refinements:
            panel.axvspan(step, step + 1, color=_BAND, linewidth=0, zorder=0)
    # By height of the panel: an objective of one's own may have losses of any size.
    note = partial(panels[-1].text, color=MUTED, transform=panels[-1].get_xaxis_transform())
    for step, count in trace.refinements.items():
        note(step, 1, f"+{count}", va="bottom")
    side = "left" if end < 0.7 * len(trace.steps) else "right"
    note(end, 0.9, f" last altered step: {end} ", ha=side, va="top")


def _places(trace: Trace) -> list[float]:
    """Where the updates stand: those of one step between it and the next."""
    return [
        step.index + number / len(step.updates) for step in trace.steps for number in range(len(step.updates))
    ]

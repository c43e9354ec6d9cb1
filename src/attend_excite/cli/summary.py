"""What came out of a command: a table for people, one JSON document for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from attend_excite.cli.messages import plain, printable
from attend_excite.nouns import find_nouns
from attend_excite.subjects import Prompt, Stream, TokenGroup

if TYPE_CHECKING:
    from attend_excite.cli.drawing import Drawing, Picture
    from attend_excite.trace import ChosenNoise, Trace, Update

# Wide enough for any table: the name of a file is of use in one piece only.
RESULTS = Console(width=1000)


def print_json(document: Mapping[str, Any]) -> None:
    """The document alone, on stdout."""
    print(printable(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)))


def table(*columns: str) -> Table:
    """An empty table in the house's style."""
    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False)


def print_drawing(drawing: Drawing) -> None:
    """A line a picture, then the sheet."""
    from attend_excite.verdict import sentence

    shown = [sentence(picture.verdict, drawing.prompt) for picture in drawing.pictures]
    verdict = ["shows"] if any(shown) else []
    maps = ["maps"] if any(picture.maps_path for picture in drawing.pictures) else []
    noise = ["noise"] if any(picture.trace.noise for picture in drawing.pictures) else []
    findings = ["in vain"] if any(picture.trace.findings for picture in drawing.pictures) else []
    columns = ("lowest attention", "updates", "seconds", "file")
    pictures = table("seed", *noise, "method", *verdict, *columns, *maps, *findings)
    for picture, shows in zip(drawing.pictures, shown, strict=True):
        pictures.add_row(
            str(picture.origin.seed),
            *[_noise(picture.trace.noise) for _ in noise],
            plain(picture.origin.settings.method.name),
            *[plain(shows) for _ in verdict],
            plain(_lowest_attention(picture.trace, drawing.prompt)),
            str(_updates_made(picture.trace)),
            f"{picture.seconds:.1f}",
            plain(str(picture.path)),
            *[plain(str(picture.maps_path)) for _ in maps],
            *[plain(_in_vain(picture.trace)) for _ in findings],
        )
    RESULTS.print(pictures)
    for note in _notes(drawing):
        RESULTS.print(note)


def drawing_document(drawing: Drawing) -> dict[str, Any]:
    """A drawing as plain data."""
    return {
        "prompt": drawing.prompt.text,
        "model": drawing.model,
        "subjects": _subjects(drawing.prompt),
        "images": [_picture(picture, drawing.prompt) for picture in drawing.pictures],
        "sheet": None if drawing.sheet is None else str(drawing.sheet),
    }


def tokens_document(prompt: Prompt) -> dict[str, Any]:
    """What is made of a prompt, as plain data."""
    return {
        "prompt": prompt.text,
        "tokens": list(prompt.tokens),
        "nouns": [noun.text for noun in find_nouns(prompt.text)],
        "subjects": _subjects(prompt),
        "cut": prompt.cut,
    }


def print_tokens(prompt: Prompt, streams: Sequence[Stream]) -> None:
    """What is made of a prompt: its tokens with their positions, its nouns, its subjects.

    Args:
        prompt: parsed.
        streams: the tables of tokens that the model reads.
    """
    lines = []
    for at, stream in enumerate(streams):
        of = f" of {stream.name}" if len(streams) > 1 else ""
        tokens = table("position", f"token{of}", "subject")
        subjects = {
            position: f"of {group.text}"
            for group in prompt.groups
            for attribute in group.attributes
            for position in (attribute.positions, *attribute.further)[at]
        }
        subjects |= {
            position: group.text
            for group in prompt.groups
            for position in (group.positions, *group.further)[at]
        }
        read = prompt.further[at - 1][0] if at else prompt.tokens
        for position, token in enumerate(read):
            subject = subjects.get(position, "")
            style = "bold green" if subject else None
            tokens.add_row(str(position), plain(token), plain(subject), style=style)
        RESULTS.print(tokens)
        reads = f"{stream.width} tokens{of} that the model reads"
        many = len(prompt.chunks)
        lines.append(f"{many} chunks of the {reads} at once" if many > 1 else f"{len(read)} of the {reads}")
    lines.append(f"nouns found: {', '.join(noun.text for noun in find_nouns(prompt.text)) or 'none'}")
    for group in prompt.groups:
        head = " ".join(prompt.tokens[position] for position in group.positions)
        wanted = _wanted_attention(group)
        places = ", ".join(map(str, group.positions))
        said = ", ".join(attribute.text for attribute in group.attributes)
        lines.append(
            f"subject {group.text}: {head}, position {places}, attention wanted {wanted}"
            + (f", said of it: {said}" if said else "")
        )
    if prompt.cut:
        lines.append(f"beyond what the model reads, so cut: {prompt.cut}")
    for line in lines:
        RESULTS.print(plain(line))


def _wanted(group: TokenGroup) -> str:
    """A subject, and what is asked of it where that isn't all: "cat, frog (0.7)"."""
    asks_all = not group.negated and group.target == 1
    return group.text if asks_all else f"{group.text} ({_wanted_attention(group)})"


def _wanted_attention(group: TokenGroup) -> str:
    return f"at most {group.target:g}" if group.negated else f"{group.target:g}"


def _notes(drawing: Drawing) -> list[RenderableType]:
    skipped = sum(picture.trace.skipped for picture in drawing.pictures)
    blacked = sum(picture.nsfw for picture in drawing.pictures)
    notes: list[RenderableType] = []
    if drawing.prompt.groups:
        notes.append(plain(f"subjects: {', '.join(map(_wanted, drawing.prompt.groups))}"))
    notes += [plain(begun) for picture in drawing.pictures[-1:] if (begun := _begun(picture))]
    if skipped:
        noun = "update" if skipped == 1 else "updates"
        notes.append(Text(f"{skipped} {noun} skipped: gradient not finite", style="yellow"))
    if blacked:
        noun = "picture" if blacked == 1 else "pictures"
        notes.append(Text(f"{blacked} {noun} blacked out by the model's safety checker", style="yellow"))
    if drawing.sheet is not None:
        notes.append(plain(f"side by side: {drawing.sheet}"))
    return notes


def _begun(picture: Picture) -> str:
    """What it was made from, and which of the steps were nursed; "": from noise alone."""
    settings, steps = picture.origin.settings, picture.trace.steps
    if settings.image is None:
        return ""
    nursed = [index for index, step in enumerate(steps, start=1) if step.updates]
    looked = f", nursed in steps {nursed[0]} to {nursed[-1]} of these" if nursed else ""
    where = "" if settings.mask is None else f" where {settings.mask.path} is white"
    return (
        f"from {settings.image.path}{where}: strength {settings.strength:g}, so {len(steps)} of "
        f"{settings.steps} steps{looked}"
    )


def _picture(picture: Picture, prompt: Prompt) -> dict[str, Any]:
    trace, updates = picture.trace, _measured(picture.trace)
    return {
        "file": str(picture.path),
        "maps": None if picture.maps_path is None else str(picture.maps_path),
        "seed": picture.origin.seed,
        "method": picture.origin.settings.method.name,
        "verdict": dict(picture.verdict),
        "losses": [_finite(loss) for loss in trace.losses],
        "attention": {word: _finite(value) for word, value in updates[-1].attention.items()}
        if updates
        else {},
        # Of a word that is several tokens, the one that stood for it.
        "nursed": {
            word: {"positions": list(places), "tokens": [prompt.tokens[place] for place in places]}
            for word, places in trace.tokens.items()
        },
        # How its noise was found, where it isn't the seed's own.
        "noise": trace.noise
        and {
            "losses": [_finite(loss) for loss in trace.noise.losses],
            "chosen": trace.noise.chosen,
            "passes": trace.noise.passes,
        },
        # What nursing did in vain, or overdid.
        "findings": [
            {"kind": found.kind, "subject": found.subject, "sentence": found.sentence}
            for found in trace.findings
        ],
        "updates": _updates_made(trace),
        "refinements": {str(index): count for index, count in trace.refinements.items()},
        "max_shift": max((_finite(update.shift) or 0.0 for update in updates), default=0.0),
        "skipped": trace.skipped,
        "nsfw": picture.nsfw,
        "seconds": round(picture.seconds, 3),
    }


def _in_vain(trace: Trace) -> str:
    """What nursing did in vain, or overdid, in a few words; the warnings say it whole: "stuck: lora"."""
    return ", ".join(f"{each.kind}: {each.subject}" if each.subject else each.kind for each in trace.findings)


def _noise(noise: ChosenNoise | None) -> str:
    """Which of the noises that were tried it was: "2 of 4"."""
    return "–" if noise is None else f"{noise.chosen + 1} of {len(noise.losses)}"


def _subjects(prompt: Prompt) -> list[dict[str, Any]]:
    return [
        {
            "text": group.text,
            "positions": list(group.positions),
            "target": group.target,
            "negated": group.negated,
            "attributes": [
                {"text": attribute.text, "positions": list(attribute.positions)}
                for attribute in group.attributes
            ],
        }
        for group in prompt.groups
    ]


def _measured(trace: Trace) -> list[Update]:
    return [update for step in trace.steps for update in step.updates]


def _updates_made(trace: Trace) -> int:
    return sum(update.shift > 0 for update in _measured(trace))


def _lowest_attention(trace: Trace, prompt: Prompt) -> str:
    """The most neglected of the subjects that must show, where it was last measured."""
    updates = _measured(trace)
    wanted = [group.text for group in prompt.groups if not group.negated]
    if not updates or not wanted:
        return "–"
    value, word = min((updates[-1].attention[word], word) for word in wanted)
    return f"{value:.2f} {word}"


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None

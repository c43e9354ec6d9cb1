"""The names of models: what they stand for, and the tokenizer of one.

Needs no torch, which takes seconds to import.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from attend_excite.documents import read_object
from attend_excite.memory import is_out_of_memory
from attend_excite.models.checkpoints import (
    add_learnt_word,
    checkpoint,
    is_weights_file,
    learnt_word,
    tokenizers,
)
from attend_excite.subjects import Stream

# Their only table of tokens is CLIP's, so that nothing need be imported that needs torch.
_CLIP_ALONE = ("StableDiffusionPipeline", "StableDiffusionAttendAndExcite", "StableDiffusionXLPipeline")

_LONGEST_NAME, _LONGEST_PATH = 200, 4000
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
"""The files of a tokenizer, of which any will do."""

SETTINGS_FILE = "attend_excite.json"
"""A model's own advice, beside its model_index.json: attention_downsampling, layers, steps, a recipe."""


@dataclass(frozen=True)
class CatalogueEntry:
    """A model with a short name: where it comes from (a Hub id, or "bundled"), one line on it, and its
    kind: "generator" makes pictures; "clip", "captioner" and "judge" look at them. A generator may have a
    judge of its pictures."""

    source: str
    summary: str
    kind: str = "generator"
    judge: str | None = None

    @property
    def bundled(self) -> bool:
        """Whether it comes with the package."""
        return self.source == "bundled"

    @property
    def tried(self) -> str:
        """On what weights nursing was tried here: its own, or random ones in its classes; "": it makes no
        pictures."""
        if self.kind != "generator":
            return ""
        return "its own weights" if self.bundled else "random weights"


def plain_title(model: str) -> str:
    """What a model's pictures without a method are called: Stable Diffusion's by that name, all others by
    their model's."""
    # Whose short names begin with sd.
    known = any(model in (name, entry.source) for name, entry in catalogue().items() if name.startswith("sd"))
    return "Stable Diffusion" if known else f"{Path(model).name}, plain"


@cache
def catalogue() -> Mapping[str, CatalogueEntry]:
    """The models with short names, those that make pictures first."""
    text = files("attend_excite").joinpath("data/models.json").read_text(encoding="utf-8")
    return {name: CatalogueEntry(**values) for name, values in json.loads(text).items()}


# Python's sentence for a pair that is none.
_UNPACKED = "values to unpack"


def source_of(name: str) -> str | Path:
    """What a short name stands for: the folder of a bundled model, or a Hub id. Other names are folders
    or Hub ids themselves and come back as they are."""
    entry = catalogue().get(name)
    if entry is None:
        return name
    return Path(str(files("attend_excite"))) / "models" / name if entry.bundled else entry.source


def load_streams(
    model: str | Path, *, revision: str | None = None, embeddings: Sequence[str | Path] = ()
) -> tuple[Stream, ...]:
    """A model's tables of tokens, without its weights: enough to look at the words of a prompt.

    Args:
        model: a short name, a folder in diffusers layout, a checkpoint's file or a Hub id, as for `load`.
        revision: branch, tag or commit of a model on the Hub.
        embeddings: files of words learnt by textual inversion, as for `load`.

    Raises:
        ValueError: there is no such model, or its architecture isn't served.
    """
    streams = _read_streams(model, revision)
    for path in embeddings:
        for stream in streams:
            add_learnt_word(stream.tokenizer, learnt_word(Path(path))[1])
    return streams


def _read_streams(model: str | Path, revision: str | None) -> tuple[Stream, ...]:
    source = generator(str(model))
    if is_weights_file(source):
        kind = checkpoint(Path(source)).kind
        assert kind is not None
        tokenizer = tokenizers(kind)["tokenizer"]
        return (Stream("CLIP", tokenizer, 0, tokenizer.model_max_length),)
    folder = Path(source) / "tokenizer"
    with sought(source, str(model), revision):
        index = _read_index(source, revision)
        if not _is_clip_alone(index):
            from attend_excite.models.loading import read_streams

            return read_streams(source, index, revision)
        from transformers import CLIPTokenizer

        if Path(source).is_dir() and not any((folder / file).is_file() for file in VOCABULARIES):
            # transformers makes an empty one instead, which knows no word.
            raise FileNotFoundError(f"it has no tokenizer, none of {', '.join(VOCABULARIES)} in '{folder}'")
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", revision=revision or "main")
    return (Stream("CLIP", tokenizer, 0, tokenizer.model_max_length),)


def load_tokenizer(model: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a model's first table of tokens; arguments and errors are those of `load_streams`."""
    return load_streams(model, revision=revision)[0].tokenizer


def _is_clip_alone(index: Mapping[str, Any]) -> bool:
    kind = str(index.get("_class_name"))
    without_t5 = kind == "StableDiffusion3Pipeline" and index.get("tokenizer_3") == [None, None]
    return without_t5 or kind.startswith(_CLIP_ALONE)


def _read_index(source: str | Path, revision: str | None) -> Mapping[str, Any]:
    path = Path(source) / "model_index.json"
    if not path.is_file():
        path = Path(hf_hub_download(str(source), "model_index.json", revision=revision))
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(f"its model_index.json {error}") from error


def generator(name: str) -> str | Path:
    """The `source_of` a model that makes pictures.

    Raises:
        ValueError: it makes none, or is misspelled.
    """
    if not name.strip():
        raise ValueError(f"the model's name is empty: give a folder, a Hub id, or one of {_generators()}")
    entry = catalogue().get(name)
    if entry and entry.kind != "generator":
        raise ValueError(f"'{name}' looks at pictures and makes none: choose one of {_generators()}")
    if len(name) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in Path(name).parts):
        raise ValueError(f"no model '{name[:40]}…': no name is as long")
    if entry is None and "/" not in name and not Path(name).exists() and not is_weights_file(name):
        close = difflib.get_close_matches(name, catalogue(), n=1)
        if close:
            raise ValueError(f"no model '{name}': did you mean '{close[0]}'?")
    return source_of(name)


def _generators() -> str:
    return ", ".join(name for name, entry in catalogue().items() if entry.kind == "generator")


def seek(source: str | Path, file: str, revision: str | None = None) -> None:
    """Ask the Hub once for a model that is neither a folder nor kept here from another time.

    Libraries that read it ask for file after file, and many times where none answers.

    Args:
        source: from `source_of`.
        file: one that every such model has.
        revision: branch, tag or commit.

    Raises:
        OSError: the Hub doesn't answer, or has none.
        ValueError: no model can have that name.
    """
    if Path(source).is_dir() or isinstance(try_to_load_from_cache(str(source), file, revision=revision), str):
        return
    try:
        there = file_exists(str(source), file, revision=revision)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of an HTTP library that isn't always the same
        raise OSError(str(error)) from error
    if not there:
        raise FileNotFoundError(f"the Hub has no {file} of that name")


@contextmanager
def sought(source: str | Path, name: str, revision: str | None) -> Iterator[None]:
    """Where a model is read: says in a ValueError that there is none, or that it isn't whole.

    A ValueError whose sentence names the model, as ours do, passes as it is.
    """
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        part = (Path(source) / "config.json").is_file()
        alone = ", only a config.json, as one part of a model has, or a judge" if part else ""
        raise ValueError(
            f"the folder '{source}' is not a model in diffusers layout: it has no model_index.json{alone}"
        )
    try:
        seek(source, "model_index.json", revision)
    except (OSError, ValueError) as error:
        reason = f"no model on the Hub that can be reached ({first_line(error)})"
        if isinstance(error, HFValidationError):
            reason = "no name that a model on the Hub can have, as owner/name"
        if name in catalogue():
            raise ValueError(f"'{name}' is {source}, and that is {reason}") from error
        raise ValueError(
            f"no model '{name}': it is no folder here, none of {_generators()}, and {reason}"
        ) from error
    try:
        yield
    except Exception as error:
        # What a damaged or strange model makes of diffusers, transformers and safetensors, and of torch.
        if is_out_of_memory(error):
            raise
        if isinstance(error, ValueError) and f"'{source}'" in str(error):
            raise
        reason = first_line(error) or type(error).__name__
        if isinstance(error, KeyError | TypeError | AttributeError | IndexError) or _UNPACKED in reason:
            reason = f"something in it is of the wrong kind or missing ({type(error).__name__}: {reason})"
        if Path(source).is_dir():
            raise ValueError(f"the model in '{source}' is not whole: {reason}") from error
        raise ValueError(f"the model '{name}' cannot be read: {reason}") from error


def first_line(error: Exception) -> str:
    """What a library says of a failure, without what follows below."""
    return str(error).strip().split("\n", 1)[0]

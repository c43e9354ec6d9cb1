"""Single files of weights, as people pass them on: what one is, and the configuration of a whole model.

Needs no torch: what stands in a file is told by its header, before its gigabytes are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

CONFIGURATIONS = Path(str(files("attend_excite"))) / "data" / "checkpoints"
"""A folder for each architecture whose checkpoints are read: a model in diffusers layout without weights."""

_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_LONGEST_HEADER = 100_000_000  # that of safetensors' own reader
_CONTEXT = 77

# Of networks that are told a class, as SDXL's, or of a picture.
_OF_A_PICTURE = "model.diffusion_model.label_emb.0.0.weight"

# What is found under the name of a file of weights, by its first bytes.
_NO_WEIGHTS: Mapping[bytes, str] = {
    b"PK\x03\x04": "a file of PyTorch's or a zip archive, which may run code where it is read",
    b"\x80": "a file of PyTorch's, which may run code where it is read",
    b"GGUF": "quantised weights in GGUF's format",
    b"version https://git-lfs": "a pointer of Git LFS and not the file: fetch it with git lfs pull",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"<": "a web page, as a download that failed leaves",
}


@dataclass(frozen=True)
class Kind:
    """What a file of weights may be: an entry of `data/file_kinds.json`.

    Attributes:
        name: the folder of its configuration, if it is a checkpoint that is read.
        title: for people, with its article.
        has: patterns, each of which some weight's name has.
        so: what to do with it; "": a checkpoint that is read.
        at_most: so many weights; None: any number.
        parts: of a checkpoint, a pattern of the names of each part.
        padding: of a checkpoint, its tokenizers and what they fill a text up with.
    """

    name: str
    title: str
    has: tuple[str, ...]
    so: str = ""
    at_most: int | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    padding: Mapping[str, str] = field(default_factory=dict)

    def fits(self, weights: Mapping[str, Any]) -> bool:
        """Whether weights of these names are of this kind."""
        few = self.at_most is None or len(weights) <= self.at_most
        return few and all(_some(pattern, weights) for pattern in self.has)


@dataclass(frozen=True)
class WeightsFile:
    """A file in safetensors' format, by its header.

    Attributes:
        path: where it is.
        weights: the shape of each by its name.
        metadata: what its maker wrote into it.
        kind: what it is; None: nothing that is known here.
    """

    path: Path
    weights: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    kind: Kind | None

    @property
    def title(self) -> str:
        """What it is, for people."""
        return self.kind.title if self.kind else "of a kind that isn't known here"


def is_weights_file(source: str | Path) -> bool:
    """Whether a model is asked for by the name of a single file, be it there or not."""
    return Path(source).is_file() or Path(source).suffix.lower() in _SUFFIXES


def read_weights_file(path: Path) -> WeightsFile:
    """What a file of weights is.

    Raises:
        ValueError: it isn't there, isn't whole, or is none.
    """
    if not path.is_file():
        raise ValueError(f"there is no file '{path}'")
    try:
        with path.open("rb") as file:
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            if reason := _no_weights(start):
                raise ValueError(f"'{path}' is {reason}")
            file.seek(8)
            header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else None
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        header = None
    try:
        assert header is not None
        metadata = header.pop("__metadata__", None) or {}
        weights = {name: tuple(entry["shape"]) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        here = path.stat().st_size - 8 - length
    except (AssertionError, AttributeError, KeyError, TypeError, IndexError):
        raise ValueError(f"'{path}' is damaged, or no file in safetensors' format: get it again") from None
    if here < end:
        raise ValueError(
            f"'{path}' is not whole: of {end:,} bytes of weights {here:,} are there; get it again"
        )
    kind = next((kind for kind in _kinds() if kind.fits(weights)), None)
    return WeightsFile(path, weights, metadata, kind)


def checkpoint(path: Path) -> WeightsFile:
    """A file that holds a whole model of an architecture whose checkpoints are read; its `kind` is there.

    Raises:
        ValueError: it is something else, or parts of it are missing.
    """
    file = read_weights_file(path)
    if file.kind is None or file.kind.so:
        advice = file.kind.so if file.kind else "give a checkpoint of Stable Diffusion 1, 2 or XL"
        raise ValueError(f"'{path}' is {file.title}: {advice}")
    for part, pattern in file.kind.parts.items():
        if not _some(pattern, file.weights):
            raise ValueError(f"'{path}' is {file.title} without its {part}: get one that is whole")
    channels = file.weights.get("model.diffusion_model.input_blocks.0.0.weight", (0, 4))[1]
    if channels != 4:
        raise ValueError(
            f"'{path}' is {file.title} whose network takes {channels} channels and not 4, as those that fill "
            "in, edit or enlarge pictures do: give one that draws from a text alone"
        )
    for mark, owner in (("edm_mean", "Playground"), ("edm_vpred.sigma_max", "CosXL")):
        if mark in file.weights:
            raise ValueError(
                f"'{path}' is {owner}'s checkpoint, whose scheduler isn't in the file: give the model's "
                "folder or Hub id"
            )
    if file.kind.name != "stable-diffusion-xl" and _OF_A_PICTURE in file.weights:
        raise ValueError(
            f"'{path}' is an unCLIP, whose network is told of a picture too: give one that draws from a text "
            "alone"
        )
    return file


def learnt_word(path: Path) -> tuple[str, list[str]]:
    """What a prompt calls a word that was learnt by textual inversion, and the tokens that it becomes, one a
    vector: by the name in the file, or else by the file's.

    Raises:
        ValueError: the file cannot be read.
    """
    weights = read_weights_file(path).weights
    name, shape = next(iter(weights.items()))
    word = name if name.startswith("<") else path.stem
    vectors = shape[0] if len(shape) > 1 else 1
    return word, [word, *(f"{word}_{index}" for index in range(1, vectors))]


def add_learnt_word(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Make a tokenizer know the tokens of a word from `learnt_word`, where a text has them to the letter."""
    from tokenizers import AddedToken

    # Otherwise it looks for them in small letters, and diffusers doesn't find the word among them again.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])


def configuration(kind: Kind) -> Path:
    """The folder with the configuration of a kind of checkpoint."""
    return CONFIGURATIONS / kind.name


def tokenizers(kind: Kind) -> dict[str, Any]:
    """A checkpoint's tokenizers by the names of its parts: CLIP's own, which no such file has within."""
    from transformers import CLIPTokenizer

    folder = Path(str(files("attend_excite"))) / "models" / "stickers" / "tokenizer"
    return {
        part: CLIPTokenizer.from_pretrained(folder, model_max_length=_CONTEXT, pad_token=padding)
        for part, padding in kind.padding.items()
    }


def prediction_type(file: WeightsFile) -> str | None:
    """What a checkpoint's network predicts, as schedulers call it, where the file says; None: it doesn't."""
    if "v_pred" in file.weights:
        return "v_prediction"
    # The latter is what ComfyUI writes.
    said = file.metadata.get("modelspec.prediction_type") or file.metadata.get("modelspec.predict_key", "")
    return {"v": "v_prediction", "epsilon": "epsilon"}.get(said)


@cache
def _kinds() -> tuple[Kind, ...]:
    text = files("attend_excite").joinpath("data/file_kinds.json").read_text(encoding="utf-8")
    return tuple(
        Kind(title=values.pop("is"), has=tuple(values.pop("has")), **values) for values in json.loads(text)
    )


def _some(pattern: str, names: Mapping[str, Any]) -> bool:
    return any(map(re.compile(pattern).search, names))


def _no_weights(start: bytes) -> str | None:
    """What a file that begins like this is, if it can't be one of safetensors."""
    if not start:
        return "empty"
    if start[8:9] == b"{":
        return None
    for beginning, what in _NO_WEIGHTS.items():
        if start.startswith(beginning):
            return f"{what}; give weights in safetensors' format"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return "a text file and holds no weights"
    return None

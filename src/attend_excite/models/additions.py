"""What is put into a model beside its own weights: LoRAs, words of textual inversion, an autoencoder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file

from attend_excite.documents import read_object
from attend_excite.models.catalogue import first_line
from attend_excite.models.checkpoints import add_learnt_word, learnt_word, read_weights_file
from attend_excite.models.families import Family

MAX_WEIGHT = 100.0

# Of diffusers' autoencoders where nobody says otherwise.
_SCALING = 0.18215


@dataclass(frozen=True)
class Addition:
    """A file or folder that a model was loaded with, known again by its content.

    Attributes:
        path: as it was given.
        digest: the first 16 hex digits of its SHA-256.
        weight: of a LoRA, -100 to 100; 1 for all else.

    Raises:
        ValueError: the weight is out of its range.
    """

    path: str
    digest: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not -MAX_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise ValueError(
                f"the weight {self.weight:g} of '{self.path}' is out of range: it goes from -{MAX_WEIGHT:g} "
                f"to {MAX_WEIGHT:g}, 1 being as it was trained"
            )

    @classmethod
    def at(cls, path: str | Path, weight: float = 1.0) -> Addition:
        """What lies under this path.

        Raises:
            ValueError: nothing does, or it can't be read.
        """
        return cls(str(path), _digest(Path(path)), weight)

    def check(self, option: str) -> None:
        """Raises a ValueError that asks for it with a command line's option, if it isn't there any more, or
        is something else by now."""
        if not Path(self.path).exists():
            raise ValueError(f"'{self.path}' is not here: say with {option} where it is")
        if _digest(Path(self.path)) != self.digest:
            raise ValueError(
                f"'{self.path}' is another than the one that was drawn with: say with {option} where that is "
                f"(its SHA-256 begins with {self.digest})"
            )


Lora = str | Path | tuple[str | Path, float] | Addition
"""A LoRA's file, or that and its weight."""


def add_loras(family: Family, loras: Sequence[Lora]) -> None:
    """Add LoRAs to a model's weights, for good.

    Args:
        family: around a pipeline that nobody else has.
        loras: their files, with or without a weight.

    Raises:
        ValueError: peft isn't installed, a file is no LoRA, or none of this architecture.
    """
    if not loras:
        return
    if find_spec("peft") is None:
        raise ValueError("LoRAs need peft, which isn't installed: pip install 'attend-excite[lora]'")
    pipeline, names, weights = family.pipeline, [], []
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"diffusers reads no LoRAs of {family.defaults.title}: leave them out")
    for index, lora in enumerate(loras):
        path, weight = _weighted(lora)
        _require_kind(path, "lora")
        try:
            pipeline.load_lora_weights(str(path), adapter_name=f"lora_{index}", local_files_only=True)
        except MemoryError:
            raise
        except Exception as error:  # what weights of other shapes make of diffusers and peft
            raise ValueError(
                f"the LoRA '{path}' doesn't fit {family.defaults.title}, so it was made for another "
                f"architecture, or is damaged ({first_line(error)})"
            ) from error
        if not any(f"lora_{index}" in fitting for fitting in pipeline.get_list_adapters().values()):
            raise ValueError(
                f"nothing in the LoRA '{path}' is for {family.defaults.title}: it was made for another "
                "architecture"
            )
        if getattr(family.network, "_overwritten_params", None):  # by weights for more channels
            raise ValueError(
                f"the LoRA '{path}' is for a network that is also given a picture, as Control LoRAs are: "
                "give one that draws from a text alone"
            )
        names.append(f"lora_{index}")
        weights.append(weight)
    pipeline.set_adapters(names, weights)
    # Into the weights themselves: attention is read, and passes run, as without.
    try:
        # Of FLUX diffusers would leave the text encoder out.
        parts = list(pipeline.get_list_adapters())
        pipeline.fuse_lora(components=parts, adapter_names=names, safe_fusing=True)
    except ValueError as error:
        raise ValueError(f"with these LoRAs the weights are NaN: {first_line(error)}") from error
    pipeline.unload_lora_weights()


@torch.no_grad()
def add_embeddings(family: Family, embeddings: Sequence[str | Path]) -> None:
    """Teach a model's text encoders words from textual inversion, each called as `learnt_word` says.

    Args:
        family: around a pipeline that nobody else has.
        embeddings: their files.

    Raises:
        ValueError: a file is none, is for another architecture, or its word is one that there is.
    """
    for path in embeddings:
        _require_kind(Path(path), "embedding")
        word, vectors = learnt_word(Path(path))
        weights = load_file(path)
        if not family.learns_words:
            raise ValueError(f"diffusers teaches {family.defaults.title} no words: leave '{path}' out")
        for name, (tokenizer, encoder) in family.learns_words.items():
            vector = weights.get(name, next(iter(weights.values())) if len(weights) == 1 else None)
            parts = family.pipeline.components
            width = parts[encoder].get_input_embeddings().weight.shape[1]
            if vector is None or vector.shape[-1] != width:
                raise ValueError(
                    f"the word in '{path}' was learnt on another architecture than {family.defaults.title}"
                )
            taken = parts[tokenizer].get_vocab().keys() & set(vectors)
            if taken:
                raise ValueError(
                    f"'{path}' is called '{word}', which there is already: give the file another name"
                )
            add_learnt_word(parts[tokenizer], vectors)
            parts[encoder].resize_token_embeddings(len(parts[tokenizer]), mean_resizing=False)
            table = parts[encoder].get_input_embeddings().weight
            table[parts[tokenizer].convert_tokens_to_ids(vectors)] = vector.to(table)


def with_vae(family: Family, folder: str | Path | None) -> None:
    """Put another autoencoder into a model's pipeline.

    Args:
        family: around a pipeline that nobody else has.
        folder: in diffusers layout, of an autoencoder or of a model that has one; None: its own stays.

    Raises:
        ValueError: it is no such folder, or doesn't fit.
    """
    if folder is None:
        return
    path, own = Path(folder), family.pipeline.vae
    if path.is_file():
        raise ValueError(
            f"'{path}' is a file, and a VAE is read from a folder in diffusers layout: load the file with "
            "diffusers' AutoencoderKL.from_single_file, and save it with save_pretrained"
        )
    path = path / "vae" if (path / "vae").is_dir() else path
    if not (path / "config.json").is_file():
        raise ValueError(f"'{folder}' is no VAE in diffusers layout: it has no config.json")
    try:
        config = read_object(path / "config.json")
    except ValueError as error:
        raise ValueError(f"'{path / 'config.json'}' {error}") from error
    if not isinstance(own, AutoencoderKL) or config.get("_class_name") != "AutoencoderKL":
        raise ValueError(
            f"the autoencoder in '{folder}' is a {config.get('_class_name')}, and the model's own a "
            f"{type(own).__name__}: only an AutoencoderKL can be put in the place of another"
        )
    fits = {
        "channels": (config.get("latent_channels"), own.config["latent_channels"]),
        "levels": (len(config.get("block_out_channels") or ()), len(own.config["block_out_channels"])),
        "as scaling factor": (config.get("scaling_factor", _SCALING), own.config["scaling_factor"]),
        "as shift": (config.get("shift_factor") or 0, own.config.get("shift_factor") or 0),
    }
    for what, (theirs, ours) in fits.items():
        if theirs != ours:
            raise ValueError(
                f"the autoencoder in '{folder}' has {theirs} {what}, and the model's own has {ours}: it is "
                "of another architecture"
            )
    try:
        read: Any = AutoencoderKL.from_pretrained(path, torch_dtype=own.dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"the autoencoder in '{folder}' is not whole: {first_line(error)}") from error
    vae, found = read
    if missing := found["missing_keys"]:
        raise ValueError(f"the autoencoder in '{folder}' is not whole: it lacks {len(missing)} weights")
    family.pipeline.register_modules(vae=vae.to(own.device))


def _weighted(lora: Lora) -> tuple[Path, float]:
    if isinstance(lora, Addition):
        return Path(lora.path), lora.weight
    path, weight = lora if isinstance(lora, tuple) else (lora, 1.0)
    checked = Addition(str(path), "", float(weight))
    return Path(checked.path), checked.weight


def _require_kind(path: Path, wanted: str) -> None:
    file = read_weights_file(path)
    if file.kind is None or file.kind.name != wanted:
        what = {"lora": "a LoRA", "embedding": "a word learnt by textual inversion"}[wanted]
        raise ValueError(f"'{path}' is {file.title}, and not {what}")


def _digest(path: Path) -> str:
    try:
        if path.is_dir():
            digest = hashlib.sha256()
            names = {each.relative_to(path).as_posix(): each for each in path.glob("**/*.*")}
            for name, each in sorted(names.items()):
                if each.is_file():
                    digest.update(name.encode())
                    digest.update(bytes.fromhex(_whole(each)))
            return digest.hexdigest()[:16]
        return _whole(path)[:16]
    except FileNotFoundError:
        raise ValueError(f"there is no file or folder '{path}'") from None
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read: {error.strerror}") from error


def _whole(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

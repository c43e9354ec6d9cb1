"""Find a model by name, folder or Hub id and make it ready."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import nn
from transformers import CLIPTokenizer

from attend_excite.guidance.schedule import Recipe
from attend_excite.models.families import Family, family_class, is_served
from attend_excite.models.hindrances import refuse_hindrances
from attend_excite.models.model import Model

SETTINGS_FILE = "attend_excite.json"
"""A model's own advice, beside its model_index.json: `attention_downsampling`, `layers` and a `recipe`."""


_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class CatalogueEntry:
    """A model with a short name: where it comes from (a Hub id, or "bundled"), one line on it, and its
    kind: "generator" makes pictures; "clip", "captioner" and "judge" look at them."""

    source: str
    summary: str
    kind: str = "generator"


@torch.inference_mode(False)  # weights that are made in a caller's could never be nursed with
def load(
    model: str | Path | DiffusionPipeline,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
) -> Model:
    """Make a model ready.

    Args:
        model: a short name ("stickers", "sd-1.4", ...: see `catalogue`), a folder in diffusers layout, a
            Hub id, or a diffusers text-to-image pipeline of a family that is served, which is used where it
            is and as it is and left as it was.
        device: "cpu", "cuda", "mps", ...; None: the first of CUDA, MPS and CPU that is there.
        dtype: of the weights, as torch.float16 or "float16"; None: float16 on CUDA, else float32.
        revision: branch, tag or commit of a model on the Hub.

    Raises:
        ValueError: there is no such model, device or dtype, its architecture or task isn't served, weights or
            files of it are missing, or a device or dtype is given for a pipeline.
    """
    if isinstance(model, DiffusionPipeline):
        if device is not None or dtype is not None or revision is not None:
            raise ValueError(
                "device, dtype and revision are for models loaded by name: move the pipeline itself"
            )
        folder = model.config.get("_name_or_path") or "pipeline"
        settings = _read_settings(folder, None) if Path(folder).is_dir() else {}
        return _ready(_family_of(model), folder, settings)

    if not isinstance(model, str | Path):
        raise ValueError(
            f"load takes a name, a folder or a diffusers pipeline, and this is a {type(model).__name__}: "
            "pass the pipeline that it is a part of"
        )
    name = str(model)
    source = _generator(name)
    if device is not None and not is_usable(device):
        raise ValueError(f"the device '{device}' is not here: leave it out, or use cpu")
    device = torch.device(device) if device is not None else _best_device()
    dtype = _dtype(dtype or ("float16" if device.type == "cuda" else "float32"))
    family = _read_family(source, name, dtype, revision)
    family.pipeline.to(device)
    return _ready(family, name, _read_settings(source, revision))


def load_tokenizer(model: str | Path, *, revision: str | None = None) -> CLIPTokenizer:
    """The tokenizer of a model alone: enough to look at the words of a prompt.

    Args:
        model: a short name, a folder in diffusers layout or a Hub id, as for `load`.
        revision: branch, tag or commit of a model on the Hub.

    Raises:
        ValueError: there is no such model.
    """
    source = _generator(str(model))
    with _sought(source, str(model), revision):
        return CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", revision=revision or "main")


@cache
def catalogue() -> Mapping[str, CatalogueEntry]:
    """The models with short names, those that make pictures first."""
    text = files("attend_excite").joinpath("data/models.json").read_text(encoding="utf-8")
    return {name: CatalogueEntry(**values) for name, values in json.loads(text).items()}


def source_of(name: str) -> str | Path:
    """What a short name stands for: the folder of a bundled model, or a Hub id. Other names are folders
    or Hub ids themselves and come back as they are."""
    entry = catalogue().get(name)
    source = entry.source if entry else name
    return Path(str(files("attend_excite"))) / "models" / name if source == "bundled" else source


def is_usable(device: str | torch.device) -> bool:
    """Whether a device is here, and torch can use it."""
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        return False
    return True


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"the dtype is {dtype}: give float32, float16 or bfloat16")
    return found


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


def _ready(family: Family, name: str, settings: dict[str, Any]) -> Model:
    """A model with its own settings, and for the rest those of its family."""
    defaults = family.defaults
    return Model(
        family,
        name,
        recipe=settings.get("recipe") or Recipe.from_dict(defaults.recipe),
        attention_downsampling=settings.get("attention_downsampling", defaults.attention_downsampling),
        layers=None if settings.get("layers") is None else tuple(settings["layers"]),
    )


def _family_of(pipeline: DiffusionPipeline) -> Family:
    """The family that serves a caller's pipeline.

    Raises:
        ValueError: none does, or it lacks a part.
    """
    name = next(
        (c.__name__ for c in type(pipeline).__mro__ if is_served(c.__name__)), type(pipeline).__name__
    )
    family = family_class(name)
    parts = pipeline.components
    if missing := [part for part in (family.network_part, "vae", "scheduler") if parts.get(part) is None]:
        raise ValueError(f"this {type(pipeline).__name__} has no {', '.join(missing)}: load it whole")
    configs = {part: getattr(module, "config", None) or {} for part, module in parts.items()}
    if reason := family.refusal(configs) or _unusable(parts[family.network_part]):
        raise ValueError(f"this {type(pipeline).__name__} is not served: {reason}")
    served = family(pipeline)
    refuse_hindrances(served.network)
    return served


def _unusable(network: Any) -> str | None:
    """Why a network, of whatever family, can't be nursed as it is."""
    if getattr(network, "encoder_hid_proj", None) is not None:
        return "an IP-Adapter is loaded into it: take it out with unload_ip_adapter()"
    if any(parameter.is_inference() for parameter in network.parameters()):
        return "its weights were made within torch.inference_mode, which forbids gradients: load it outside"
    return None


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _generator(name: str) -> str | Path:
    entry = catalogue().get(name)
    if entry and entry.kind != "generator":
        raise ValueError(f"'{name}' looks at pictures and makes none: choose one of {_generators()}")
    if entry is None and "/" not in name and not Path(name).exists():
        close = difflib.get_close_matches(name, catalogue(), n=1)
        if close:
            raise ValueError(f"no model '{name}': did you mean '{close[0]}'?")
    return source_of(name)


def _generators() -> str:
    return ", ".join(name for name, entry in catalogue().items() if entry.kind == "generator")


def _read_family(source: str | Path, name: str, dtype: torch.dtype, revision: str | None) -> Family:
    with _sought(source, name, revision):
        # What can't be served, or isn't whole, is told before its weights are read.
        index: Any = DiffusionPipeline.load_config(source, revision=revision)
        kinds = {part: kind for part, kind in index.items() if isinstance(kind, list) and None not in kind}
        family = family_class(str(index.get("_class_name")))
        if Path(source).is_dir():
            configs = {part: _read_config(Path(source), part) for part in kinds}
            if reason := family.refusal(configs):
                raise ValueError(f"the model in '{source}' is not served: {reason}")
        parts = {
            part: _read_weights(kind, source, part, dtype, revision)
            for part, kind in kinds.items()
            if kind[0] in ("diffusers", "transformers") and issubclass(_class_of(kind), nn.Module)
        }
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, revision=revision, **parts)
    return _family_of(pipeline)


def _class_of(kind: Sequence[str]) -> Any:
    """A part's class by its library and name, as model_index.json has them."""
    library = import_module(kind[0])
    if not hasattr(library, kind[1]):
        raise ValueError(
            f"its model_index.json names {kind[1]}, which {kind[0]} doesn't have: update {kind[0]}"
        )
    return getattr(library, kind[1])


def _read_config(folder: Path, part: str) -> dict[str, Any]:
    if not (folder / part).is_dir():
        raise ValueError(f"the model in '{folder}' is not whole: it has no folder '{part}'")
    if "tokenizer" in part:
        if not any((folder / part / file).is_file() for file in _VOCABULARIES):
            raise ValueError(
                f"the model in '{folder}' is not whole: '{part}' has no vocabulary "
                f"({', '.join(_VOCABULARIES)})"
            )
        return {}
    path = folder / part / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' is not a configuration: it must be an object")
    return config


def _read_weights(
    kind: Sequence[str], source: str | Path, part: str, dtype: torch.dtype, revision: str | None
) -> Any:
    """A part with all of its weights; libraries only warn where some aren't there, and draw with noise."""
    named = {"dtype": dtype} if kind[0] == "transformers" else {"torch_dtype": dtype}
    module, found = _class_of(kind).from_pretrained(
        source, subfolder=part, revision=revision, output_loading_info=True, **named
    )
    for what, key in (
        ("lacks", "missing_keys"),
        ("has unknown", "unexpected_keys"),
        ("has misshapen", "mismatched_keys"),
    ):
        if names := sorted(str(name) for name in found.get(key) or ()):
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"the weights of '{part}' in '{source}' are not those of a {kind[1]}: the file {what} "
                f"{len(names)} of them ({shown}); get the model again, or update {kind[0]}"
            )
    return module


@contextmanager
def _sought(source: str | Path, name: str, revision: str | None) -> Iterator[None]:
    """Where a model is read: says in a ValueError that there is none."""
    if Path(source).is_file():
        raise ValueError(
            f"'{source}' is a single file: load it with diffusers' from_single_file, and pass the pipeline "
            "to load"
        )
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise ValueError(
            f"the folder '{source}' is not a model in diffusers layout: it has no model_index.json"
        )
    try:
        seek(source, "model_index.json", revision)
    except (OSError, ValueError) as error:
        reason = f"no model on the Hub that can be reached ({_first_line(error)})"
        if name in catalogue():
            raise ValueError(f"'{name}' is {source}, and that is {reason}") from error
        raise ValueError(
            f"no model '{name}': it is no folder here, none of {_generators()}, and {reason}"
        ) from error
    try:
        yield
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        if Path(source).is_dir():
            raise ValueError(f"the model in '{source}' is not whole: {_first_line(error)}") from error
        raise ValueError(f"the model '{name}' cannot be read: {_first_line(error)}") from error


def _read_settings(source: str | Path, revision: str | None) -> dict[str, Any]:
    path = Path(source) / SETTINGS_FILE
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(str(source), SETTINGS_FILE, revision=revision))
        except (OSError, EntryNotFoundError):
            return {}
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if unknown := sorted(settings.keys() - {"attention_downsampling", "layers", "recipe"}):
            raise ValueError(f"unknown: {unknown[0]}")
        if "recipe" in settings:
            settings["recipe"] = Recipe.from_dict(settings["recipe"])
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' cannot be used: {error}") from error
    return settings


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]

"""Make a model ready, found by name, folder or Hub id."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from attend_excite.documents import read_object
from attend_excite.guidance.schedule import Recipe
from attend_excite.models.additions import Lora, add_embeddings, add_loras, with_vae
from attend_excite.models.catalogue import SETTINGS_FILE, VOCABULARIES, first_line, generator, sought
from attend_excite.models.checkpoints import (
    checkpoint,
    configuration,
    is_weights_file,
    prediction_type,
    tokenizers,
)
from attend_excite.models.families import Family, family_class, is_served
from attend_excite.models.hindrances import refuse_hindrances
from attend_excite.models.model import Model
from attend_excite.subjects import Stream

# Parts that a pipeline goes without, as Stable Diffusion 3 does without T5.
_MAY_LACK = {"text_encoder_3", "tokenizer_3"}
# Of transformers 4, in many a model's index; diffusers itself reads them under their new names.
_RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}


@torch.inference_mode(False)  # weights that are made in a caller's could never be nursed with
def load(
    model: str | Path | DiffusionPipeline,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    loras: Sequence[Lora] = (),
    embeddings: Sequence[str | Path] = (),
    vae: str | Path | None = None,
) -> Model:
    """Make a model ready.

    Args:
        model: a short name ("stickers", "sd-1.4", ...: see `catalogue`), a folder in diffusers layout, a
            checkpoint of Stable Diffusion 1, 2 or XL in one .safetensors file, a Hub id, or a diffusers
            text-to-image pipeline of a family that is served, which is used where it is and as it is and left
            as it was.
        device: "cpu", "cuda", "mps", ...; None: the first of CUDA, MPS and CPU that is there.
        dtype: of the weights, as torch.float16 or "float16"; None: on CUDA the 16-bit numbers that the
            architecture is for (float16, or bfloat16 for FLUX, Qwen-Image, Z-Image and Sana), else float32.
        revision: branch, tag or commit of a model on the Hub.
        loras: files of LoRAs that are added to the weights, or (file, weight) pairs; these need peft.
        embeddings: files of words learnt by textual inversion, each called by the name in it or its file's.
        vae: a folder with another autoencoder in diffusers layout.

    Raises:
        ValueError: there is no such model, device or dtype, its architecture or task isn't served, a file is
            something else, weights or files of it are missing, or a device or dtype is given for a pipeline.
    """
    if isinstance(model, DiffusionPipeline):
        if device is not None or dtype is not None or revision is not None:
            raise ValueError(
                "device, dtype and revision are for models loaded by name: move the pipeline itself"
            )
        if loras or embeddings or vae is not None:
            raise ValueError(
                "loras, embeddings and vae are for models loaded by name: put them into the pipeline itself, "
                "with load_lora_weights and fuse_lora, load_textual_inversion, or vae="
            )
        folder = model.config.get("_name_or_path") or "pipeline"
        return ready(family_of(model), folder, settings_in(folder))

    if not isinstance(model, str | Path):
        raise ValueError(
            f"load takes a name, a folder or a diffusers pipeline, and this is a {type(model).__name__}: "
            "pass the pipeline that it is a part of"
        )
    name = str(model)
    source = generator(name)
    if device is not None and not is_usable(device):
        raise ValueError(f"the device '{device}' is not here: leave it out, or use cpu")
    device = torch.device(device) if device is not None else _best_device()
    wanted = None if dtype is None else _dtype(dtype)
    if is_weights_file(source):
        family, settings = _read_checkpoint(Path(source), device, wanted), {}
    else:
        family = _read_family(source, name, device, wanted, revision)
        settings = _read_settings(source, revision)
        family.pipeline.to(device)
    with_vae(family, vae)
    add_embeddings(family, embeddings)
    add_loras(family, loras)
    return ready(family, name, settings)


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


def ready(family: Family, name: str, settings: dict[str, Any]) -> Model:
    """A model with its own settings, and for the rest those of its family."""
    defaults = family.defaults
    return Model(
        family,
        name,
        recipe=settings.get("recipe") or Recipe.from_dict(defaults.recipe),
        attention_downsampling=settings.get("attention_downsampling", defaults.attention_downsampling),
        steps=settings.get("steps", defaults.steps),
        layers=None if settings.get("layers") is None else tuple(settings["layers"]),
    )


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The family that serves a caller's pipeline.

    Raises:
        ValueError: none does, or it lacks a part.
    """
    name = next(
        (c.__name__ for c in type(pipeline).__mro__ if is_served(c.__name__)), type(pipeline).__name__
    )
    family = family_class(name)
    parts = pipeline.components
    configs = {part: getattr(module, "config", None) or {} for part, module in parts.items()}
    reason = family.refusal(configs)
    texts = [
        part for part in parts if part.startswith(("text_encoder", "tokenizer")) and part not in _MAY_LACK
    ]
    missing = [part for part in (family.network_part, "vae", "scheduler", *texts) if parts.get(part) is None]
    if missing and not reason:
        raise ValueError(f"this {type(pipeline).__name__} has no {', '.join(missing)}: load it whole")
    if reason := reason or unusable(parts[family.network_part]):
        raise ValueError(f"this {type(pipeline).__name__} is not served: {reason}")
    served = family(pipeline)
    refuse_hindrances(served.network)
    return served


def unusable(network: Any) -> str | None:
    """Why a network, of whatever family, can't be nursed as it is, in a sentence; None: it can."""
    if getattr(network, "encoder_hid_proj", None) is not None:
        return "an IP-Adapter is loaded into it: take it out with unload_ip_adapter(), or use it in ComfyUI"
    if any(parameter.is_inference() for parameter in network.parameters()):
        return "its weights were made within torch.inference_mode, which forbids gradients: load it outside"
    return None


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _read_family(
    source: str | Path, name: str, device: torch.device, dtype: torch.dtype | None, revision: str | None
) -> Family:
    # What can't be served, or isn't whole, is told before its weights are read.
    with sought(source, name, revision):
        index: Any = {} if Path(source).is_dir() else DiffusionPipeline.load_config(source, revision=revision)
    if Path(source).is_dir():
        index = _config(Path(source) / "model_index.json")
    kinds = {part: kind for part, kind in index.items() if isinstance(kind, list) and None not in kind}
    family = family_class(str(index.get("_class_name")))
    if Path(source).is_dir():
        configs = {part: _read_config(Path(source), part) for part in kinds}
        if reason := family.refusal(configs):
            raise ValueError(f"the model in '{source}' is not served: {reason}")
    dtype = dtype or _usual_dtype(family, device)
    with sought(source, name, revision):
        parts = {
            part: _read_weights(kind, source, part, dtype, revision)
            for part, kind in kinds.items()
            if kind[0] in ("diffusers", "transformers") and issubclass(_class_of(kind), nn.Module)
        }
        # Saved without it, as Stable Diffusion 3 may be without T5.
        parts |= {part: None for part, kind in index.items() if isinstance(kind, list) and None in kind}
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, revision=revision, **parts)
    return family_of(pipeline)


def _usual_dtype(family: type[Family], device: torch.device) -> torch.dtype:
    return family.half if device.type == "cuda" else torch.float32


def _read_checkpoint(path: Path, device: torch.device, dtype: torch.dtype | None) -> Family:
    """A whole model out of one file, with the package's configuration: nobody asks the Hub."""
    file = checkpoint(path)
    assert file.kind is not None
    folder = configuration(file.kind)
    class_name = str(_config(folder / "model_index.json")["_class_name"])
    kind: Any = _class_of(("diffusers", class_name))
    dtype = dtype or _usual_dtype(family_class(class_name), device)
    try:
        pipeline = kind.from_single_file(
            str(path), config=str(folder), torch_dtype=dtype, local_files_only=True, **tokenizers(file.kind)
        )
        pipeline.to(device)
    except MemoryError:
        raise
    except Exception as error:  # what weights of other shapes make of diffusers and torch
        reason = first_line(error) or type(error).__name__
        if "meta tensor" in reason:  # What the file doesn't have was never made.
            reason = "it lacks weights, so it isn't whole, or of a smaller relative: give that one's folder"
        raise ValueError(f"'{path}' cannot be read as {file.title}: {reason}") from error
    predicts = prediction_type(file)
    if predicts is None and file.kind.name == "stable-diffusion-2":
        warnings.warn(
            f"'{path}' doesn't say what it predicts: it is taken for one of 768 pixels, which predicts "
            "velocity. If its pictures are noise, make the pipeline with diffusers' from_single_file, set "
            "its scheduler's prediction_type to epsilon, and pass it to load",
            stacklevel=4,
        )
    if predicts is not None:
        options = {"prediction_type": predicts}
        if "ztsnr" in file.weights:
            options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **options)
    return family_of(pipeline)


def _class_of(kind: Sequence[str]) -> Any:
    """A part's class by its library and name, as model_index.json has them."""
    library, name = import_module(kind[0]), _RENAMED.get(kind[1], kind[1])
    if not hasattr(library, name):
        raise ValueError(f"its model_index.json names {name}, which {kind[0]} doesn't have: update {kind[0]}")
    return getattr(library, name)


def _read_config(folder: Path, part: str) -> dict[str, Any]:
    if not (folder / part).is_dir():
        raise ValueError(f"the model in '{folder}' is not whole: it has no folder '{part}'")
    if "tokenizer" in part:
        if not any((folder / part / file).is_file() for file in VOCABULARIES):
            raise ValueError(
                f"the model in '{folder}' is not whole: '{part}' has no vocabulary "
                f"({', '.join(VOCABULARIES)})"
            )
        return {}
    path = folder / part / "config.json"
    return _config(path) if path.is_file() else {}


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


def _config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise ValueError(f"'{path}' {error}") from error


def settings_in(folder: str | Path) -> dict[str, Any]:
    """What the `SETTINGS_FILE` in a model's folder says, as `ready` takes it; nothing where there is none, or
    no such folder.

    Raises:
        ValueError: it cannot be used.
    """
    return _read_settings(folder, None) if Path(folder).is_dir() else {}


def _read_settings(source: str | Path, revision: str | None) -> dict[str, Any]:
    path = Path(source) / SETTINGS_FILE
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(str(source), SETTINGS_FILE, revision=revision))
        except (OSError, EntryNotFoundError):
            return {}
    if not path.is_file():
        return {}
    settings = _config(path)
    try:
        if unknown := sorted(settings.keys() - {"attention_downsampling", "layers", "recipe", "steps"}):
            raise ValueError(f"unknown: {unknown[0]}")
        for what in ("attention_downsampling", "steps"):
            number = settings.get(what, 1)
            if type(number) is not int or number < 1:
                raise ValueError(f"{what} is {number!r}: it must be a whole number, 1 or more")
        layers = settings.get("layers") or []
        if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
            raise ValueError("layers must be a list of names")
        if "recipe" in settings:
            settings["recipe"] = Recipe.from_dict(settings["recipe"])
            for name in settings["recipe"].tuned:
                Recipe.named(name, settings["recipe"])
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' cannot be used: {error}") from error
    return settings


def read_streams(source: str | Path, index: Mapping[str, Any], revision: str | None) -> tuple[Stream, ...]:
    """The tables of tokens of a model whose weights nobody reads.

    Args:
        source: a folder or a Hub id.
        index: what its model_index.json says.
        revision: branch, tag or commit of a model on the Hub.

    Raises:
        ValueError: no family serves it.
    """
    family = family_class(str(index.get("_class_name")))
    kinds = {part: kind for part, kind in index.items() if isinstance(kind, list) and None not in kind}
    # A pipeline whose networks are their configurations.
    left_out = {part: None for part in kinds if "tokenizer" not in part and part != "scheduler"}
    absent = {part: None for part, kind in index.items() if isinstance(kind, list) and None in kind}
    pipeline: Any = DiffusionPipeline.from_pretrained(source, revision=revision, **left_out, **absent)
    for part in left_out:
        path = Path(source) / part / "config.json"
        if not Path(source).is_dir():
            path = Path(hf_hub_download(str(source), "config.json", subfolder=part, revision=revision))
        config = read_object(path)
        object.__setattr__(pipeline, part, SimpleNamespace(config=config))
    return family(pipeline).streams()

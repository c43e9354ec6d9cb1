"""The denoising loop, one for every method: (model, prompt, method, seeds) -> pictures."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from attend_excite.attention.maps import AttentionMaps
from attend_excite.attention.places import map_size
from attend_excite.methods.attend_excite import AttendAndExcite
from attend_excite.methods.base import Method, Run, Step
from attend_excite.methods.stable_diffusion import StableDiffusion
from attend_excite.models.hindrances import refuse_hindrances
from attend_excite.models.model import Model, fitting_batch_size, offloaded_afterwards, prepared
from attend_excite.schedulers import seed_noise, shift_carrier
from attend_excite.subjects import Prompt, Subject, locate, parse
from attend_excite.trace import Trace, TraceStep, updates_of

Subjects = Sequence[str | int | Sequence[int] | Subject]

# Enough to see where a single word's attention settles, at a few passes a word and model.
_DOMINANT_STEPS = 8


@dataclass(frozen=True)
class StepEvent:
    """What a callback gets after each step.

    Attributes:
        index: of the iteration, from 0.
        iterations: how many the run has.
        timestep: the scheduler's.
        images: the batch's images by their index in the result.
        latents: (B, C, H, W) after the step.
    """

    index: int
    iterations: int
    timestep: float
    images: range
    latents: Tensor


Callback = Callable[[StepEvent], None]


@dataclass(frozen=True)
class Generation:
    """Pictures and how they came to be. Every list has one entry an image: all seeds of the first prompt,
    then all seeds of the next.

    Attributes:
        images: the pictures; empty where they were not decoded.
        prompts: the prompt of each image, parsed.
        seeds: the seed of each image.
        nsfw: whether the model's safety checker blacked the image out; False without a checker.
        trace: losses, attention and updates of every step.
        latents: (images, C, H, W), the denoised latents on the CPU.
        maps: the recorded attention, where it was asked for.
    """

    images: list[Image.Image]
    prompts: list[Prompt]
    seeds: list[int]
    nsfw: list[bool]
    trace: list[Trace]
    latents: Tensor
    _maps: AttentionMaps | None

    @property
    def maps(self) -> AttentionMaps:
        """`maps["frog"]`: where the word was attended to, from the conditional passes (`WordMaps`).

        Raises:
            ValueError: the maps were not recorded.
        """
        if self._maps is None:
            raise ValueError("the attention was not recorded: generate with maps=True")
        return self._maps


@torch.inference_mode(False)  # a caller's would forbid the gradients
@torch.no_grad()
def generate(
    model: Model,
    prompt: str | Sequence[str],
    *,
    method: Method | None = None,
    subjects: Subjects | Sequence[Subjects | None] | None = None,
    seeds: int | Iterable[int] = (0,),
    steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float | None = None,
    negative_prompt: str | None = "",
    height: int | None = None,
    width: int | None = None,
    batch_size: int | Literal["auto"] = 8,
    maps: bool | tuple[int, int] = False,
    decode: bool = True,
    progress: bool = True,
    callback: Callback | None = None,
) -> Generation:
    """Make pictures of one or more prompts, one picture a prompt and seed.

    The noise of a picture depends on its seed and size alone: the same seed gives the same picture with
    every batch, and every method starts from the same noise.

    Args:
        model: from `load`; left as it was.
        prompt: what to draw, or several such. "a [cat] and a [frog]" names the subjects.
        method: how; None: Attend-and-Excite with the recipe that the model recommends.
        subjects: None: the nouns; else words, phrases, token positions or `Subject`s, as `parse` takes
            them. With several prompts a list of those, one a prompt, or None for its nouns.
        seeds: one or more, each 0 or more.
        steps: denoising steps, 1 or more; None: as many as are usual for the model, 50 for Stable Diffusion.
        guidance_scale: of classifier-free guidance, 1 or less: none; or of the guidance that is distilled
            into the model, as in FLUX. None: what is usual for the model, 7.5 for Stable Diffusion.
        true_cfg_scale: of classifier-free guidance beside distilled guidance, above 1; None: none.
        negative_prompt: what the unconditional half of the guidance sees, for all prompts; None: nothing.
        height: in pixels, a multiple of the autoencoder's factor (8); None: the model's own.
        width: likewise.
        batch_size: pictures in one pass; "auto": as many as should fit in memory. A batch that runs out
            of it all the same starts again with half as many.
        maps: keep the attention of every step: see `Generation.maps`. True: of the layers that nursing
            reads; (height, width): of the layers whose maps have this size, as 32x32 or 8x8.
        decode: make images of the latents.
        progress: show a bar of steps.
        callback: called after every step; what it raises ends the run and leaves the model as it was.

    Raises:
        ValueError: an argument is out of its range, or a subject cannot be found.
    """
    method = method or AttendAndExcite()
    if isinstance(method, type | str):
        raise ValueError(f"the method is {method}: give one that is made, as AttendAndExcite()")
    refuse_hindrances(model.network)
    # numpy's integers, and arrays of them, are as good.
    seeds = [operator.index(seed) for seed in (seeds if isinstance(seeds, Iterable) else [seeds])]
    size = _latent_size(model, height, width)
    _require(len(seeds) > 0 and min(seeds) >= 0, "seeds", seeds, "one or more numbers, none negative")
    family = model.family
    steps = family.defaults.steps if steps is None else steps
    if guidance_scale and not family.takes_guidance:
        warnings.warn(
            f"{model.name} has no guidance to set: {guidance_scale:g} changes nothing", stacklevel=2
        )
    guidance_scale = family.defaults.guidance_scale if guidance_scale is None else guidance_scale
    _require(hasattr(steps, "__index__") and steps >= 1, "steps", steps, "a whole number, 1 or more")
    if isinstance(method, AttendAndExcite) and steps < family.defaults.fewest_steps:
        warnings.warn(
            f"of {steps} steps nursing has hardly one in which it could do anything: give "
            f"{family.defaults.fewest_steps} or more",
            stacklevel=2,
        )
    _require(0 <= guidance_scale < math.inf, "guidance_scale", guidance_scale, "0 or more, and finite")
    if true_cfg_scale is not None and not family.distilled_guidance:
        raise ValueError(
            f"true_cfg_scale is for models whose guidance is distilled, and {model.name} has classifier-free "
            "guidance: give guidance_scale alone"
        )
    cfg_scale = true_cfg_scale or 1.0
    if not family.distilled_guidance:
        cfg_scale = family.weight_of_guidance(guidance_scale)
    distilled = guidance_scale if family.distilled_guidance else None
    negative_prompt = "" if negative_prompt is None else negative_prompt
    _require(isinstance(negative_prompt, str), "negative_prompt", negative_prompt, "one text for all prompts")
    counted = batch_size == "auto" or (hasattr(batch_size, "__index__") and batch_size >= 1)
    _require(counted, "batch_size", batch_size, '1 or more, or "auto"')
    prompts = _parse(model, prompt, subjects, method)
    if method.uses_subjects and min(map_size(size, model.attention_downsampling)) < 2:
        least = 2 * model.attention_downsampling * family.pixels_per_cell
        raise ValueError(f"the picture is too small for attention maps: make it {least} pixels wide and high")
    if decode:  # there is a picture to be disappointed by
        _warn_of_unknown_words(model, prompts)
    map_downsampling = _map_downsampling(model, size, maps) if maps else None

    jobs = [(parsed, seed) for parsed in prompts for seed in seeds]
    in_one_pass = fitting_batch_size(model, size) if batch_size == "auto" else batch_size
    results: list[_Result] = []
    with tqdm(disable=not progress, unit="step", leave=False) as bar, offloaded_afterwards(model.pipeline):
        start = 0
        while start < len(jobs):
            batch = jobs[start : start + in_one_pass]
            done = bar.n
            run = _encode(model, [parsed for parsed, _ in batch], size, cfg_scale, negative_prompt, distilled)
            run.map_downsampling = map_downsampling
            family.set_timesteps(run.scheduler, steps, size)
            iterations = len(run.scheduler.timesteps)
            seed_noise(run.scheduler, [seed for _, seed in batch])
            bar.total = done + iterations * -(-(len(jobs) - start) // in_one_pass)
            after_step = _reporter(bar, callback, range(start, start + len(batch)), iterations)
            generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
            noise = _noise(model, size, generators, run.latents_dtype)
            try:
                latents, seconds = denoise(run, method, noise, generators, after_step=after_step)
            except torch.OutOfMemoryError:
                if batch_size != "auto" or len(batch) == 1:
                    raise
                in_one_pass, bar.n = len(batch) // 2, done
                continue
            images, flagged = family.decode(latents) if decode else ([], None)
            nsfw = [False] * len(batch) if flagged is None else [bool(flag) for flag in flagged]
            results.append(_Result(images, nsfw, _trace(run, seconds), latents.cpu(), run.maps, run.columns))
            start += len(batch)

    return Generation(
        images=[image for result in results for image in result.images],
        prompts=[parsed for parsed, _ in jobs],
        seeds=[seed for _, seed in jobs],
        nsfw=[flag for result in results for flag in result.nsfw],
        trace=[trace for result in results for trace in result.trace],
        latents=torch.cat([result.latents for result in results]),
        _maps=_attention_maps(model, [parsed for parsed, _ in jobs], results) if maps else None,
    )


@torch.no_grad()
def denoise(
    run: Run,
    method: Method,
    noise: Tensor,
    generators: Sequence[torch.Generator] | torch.Generator | None,
    *,
    eta: float = 0.0,
    after_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, list[float]]:
    """The denoising loop, for a batch.

    Args:
        run: the batch; its scheduler has its timesteps set.
        method: what happens at a step.
        noise: (B, C, H, W) standard normal, float32 or wider.
        generators: for the noise that stochastic schedulers add, one for all images or one each.
        eta: the share of added noise in DDIM (Song et al.), 0 to 1; other schedulers have none.
        after_step: called with the step's index and timestep and the new latents.

    Returns:
        The denoised latents (B, C, H, W), and the seconds that each iteration took.
    """
    scheduler = run.scheduler
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"eta": eta, "generator": list(generators) if isinstance(generators, Sequence) else generators}
    extra = {name: value for name, value in extra.items() if name in accepted}
    # Flow matching starts from the noise as it is, and its schedulers have no word for that.
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    carry = shift_carrier(scheduler)
    seconds: list[float] = []
    with prepared(run.model.network), method.attach(run) as step:
        for index, timestep in enumerate(scheduler.timesteps):
            began = time.perf_counter()
            shifted, output = step(latents, Step(index, timestep))
            carry(None if shifted is latents else shifted - latents)
            latents = scheduler.step(output, timestep, shifted, **extra, return_dict=False)[0]
            seconds.append(time.perf_counter() - began)
            if after_step is not None:
                after_step(index, timestep, latents)
    return latents, seconds


@dataclass(frozen=True)
class _Result:
    """One batch's share of a `Generation`; `maps` has one (B, H, W, tokens) tensor a step, whose tokens are
    those of `columns`."""

    images: list[Image.Image]
    nsfw: list[bool]
    trace: list[Trace]
    latents: Tensor
    maps: list[Tensor]
    columns: tuple[int, ...] | None


def _parse(
    model: Model,
    prompt: str | Sequence[str],
    subjects: Subjects | Sequence[Subjects | None] | None,
    method: Method,
) -> list[Prompt]:
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    _require(len(texts) > 0, "prompt", texts, "a text, or several")
    wanted: Sequence[Any] = [subjects] if isinstance(prompt, str) else subjects or [None] * len(texts)
    if not isinstance(wanted, Iterable) or any(not isinstance(named, Iterable | None) for named in wanted):
        raise ValueError(
            f"subjects is {subjects}: it must be a list, like ['cat', 'frog'], and with several prompts a "
            "list of such lists, one a prompt"
        )
    if len(wanted) != len(texts):
        raise ValueError(f"{len(texts)} prompts but subjects for {len(wanted)}: give a list a prompt")
    if not method.uses_subjects:
        wanted = [()] * len(texts)
    elif any(named is not None and not len(named) for named in wanted):
        raise ValueError(
            f"{method.title} needs a subject: name at least one, or leave subjects out to take the nouns"
        )
    return [parse(text, model.family.streams(), named) for text, named in zip(texts, wanted, strict=True)]


def _warn_of_unknown_words(model: Model, prompts: Sequence[Prompt]) -> None:
    """A model that was trained on few words, as the bundled one, has noughts for all others."""
    weights = model.pipeline.text_encoder.get_input_embeddings().weight
    if weights.is_meta or model.family.name != "stable-diffusion":  # offloaded, or trained on everything
        return
    for prompt in dict.fromkeys(prompts):
        ids = model.tokenizer(prompt.text, truncation=True).input_ids
        if len(ids) != len(prompt.tokens):  # a learnt word stands for several tokens
            continue
        unread = {prompt.spans[at][0] for at in range(1, len(ids) - 1) if not weights[ids[at]].any()}
        for word in re.finditer(r"[\w'-]+", prompt.text):
            if unread.intersection(range(*word.span())):
                warnings.warn(
                    f"{model.name} has never read the word '{word[0]}', so it cannot draw it", stacklevel=2
                )


def _latent_size(model: Model, height: int | None, width: int | None) -> tuple[int, int]:
    factor = model.family.size_factor
    height = model.default_size[0] if height is None else height
    width = model.default_size[1] if width is None else width
    for what, pixels in (("height", height), ("width", width)):
        fine = hasattr(pixels, "__index__") and pixels > 0 and pixels % factor == 0
        _require(fine, what, pixels, f"a multiple of {factor} pixels")
    return model.latent_size(height, width)


def _map_downsampling(model: Model, latent: tuple[int, int], maps: bool | tuple[int, int]) -> int:
    if isinstance(maps, bool):
        return model.attention_downsampling
    _require(isinstance(maps, Sequence) and len(maps) == 2, "maps", maps, "True, or (height, width)")
    return model.family.downsampling_for(latent, maps)


def _encode(
    model: Model,
    prompts: list[Prompt],
    size: tuple[int, int],
    guidance_scale: float,
    negative_prompt: str,
    distilled: float | None,
) -> Run:
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    negative = negative_prompt if guidance_scale > 1 else None
    text, empty = model.family.encode(texts, negative, distilled, size)
    rows = [texts.index(prompt.text) for prompt in prompts]
    return Run(
        model=model,
        prompts=tuple(prompts),
        text=text[rows],
        empty_text=None if empty is None else empty[rows],
        guidance_scale=guidance_scale,
        scheduler=copy.deepcopy(model.pipeline.scheduler),
        size=size,
        negative=negative_prompt,
        distilled=distilled,
        dominant_token=lambda word, positions: _dominant_token(model, word, positions),
    )


def _dominant_token(model: Model, prompt: str, positions: tuple[int, ...]) -> int:
    """Which of a word's tokens most attention goes to when the model draws the word alone (Appendix A.2)."""
    drawn = generate(
        model,
        prompt,
        method=StableDiffusion(),
        steps=_DOMINANT_STEPS,
        # No second pass, and what is told to a network that imitates guidance as it is used to.
        guidance_scale=None if model.family.distilled_guidance else 0.0,
        maps=True,
        decode=False,
        progress=False,
    )
    maps = drawn.maps.values[0, ..., list(positions)]
    return int(maps.mean(dim=0).amax(dim=(0, 1)).argmax())


def _noise(
    model: Model, size: tuple[int, int], generators: Sequence[torch.Generator], dtype: torch.dtype
) -> Tensor:
    shape = (model.family.latent_channels, *size)
    noise = [torch.randn(shape, generator=generator, dtype=dtype) for generator in generators]
    return torch.stack(noise).to(model.device)


def _reporter(
    bar: tqdm[Any], callback: Callback | None, images: range, iterations: int
) -> Callable[[int, Tensor, Tensor], None]:
    def after_step(index: int, timestep: Tensor, latents: Tensor) -> None:
        bar.update()
        if callback is not None:
            callback(StepEvent(index, iterations, float(timestep), images, latents))

    return after_step


def _trace(run: Run, seconds: list[float]) -> list[Trace]:
    timesteps = [float(timestep) for timestep in run.scheduler.timesteps]
    subjects = [[group.text for group in prompt.groups] for prompt in run.prompts]
    return [
        Trace(
            tuple(
                TraceStep(index, timestep, took, updates_of(run.visits.get(index, []), row, names))
                for index, (timestep, took) in enumerate(zip(timesteps, seconds, strict=True))
            )
        )
        for row, names in enumerate(subjects)
    ]


def _attention_maps(model: Model, prompts: list[Prompt], results: list[_Result]) -> AttentionMaps:
    if not all(result.maps for result in results):
        raise ValueError(
            "there are no maps: the method must predict with run.predict_guided, which keeps them"
        )

    def find(image: int, word: str) -> Sequence[int]:
        return locate(word, prompts[image].text, model.family.streams())

    if results[0].columns is None:
        return AttentionMaps(torch.cat([torch.stack(result.maps, dim=1) for result in results]), find)
    # Batches keep the columns of their own longest prompts; what a batch hasn't, nobody attended to.
    columns = tuple(sorted({column for result in results for column in result.columns or ()}))
    values = []
    for result in results:
        maps = torch.stack(result.maps, dim=1)
        wide = maps.new_zeros(*maps.shape[:-1], len(columns))
        wide[..., [columns.index(column) for column in result.columns or ()]] = maps
        values.append(wide)
    return AttentionMaps(torch.cat(values), find, columns)


def _require(fine: bool, what: str, value: object, wanted: str) -> None:
    if not fine:
        raise ValueError(f"{what} is {value}: it must be {wanted}")

"""The denoising loop, one for every method: (model, prompt, method, seeds) -> pictures."""

from __future__ import annotations

import inspect
import math
import operator
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from attend_excite.a1111 import Chunk
from attend_excite.attention.maps import AttentionMaps
from attend_excite.attention.places import map_size
from attend_excite.checks import require
from attend_excite.finite import check_finite
from attend_excite.memory import is_out_of_memory
from attend_excite.methods.attend_excite import AttendAndExcite
from attend_excite.methods.base import Method, Run, Start, Step
from attend_excite.methods.composable import ComposableDiffusion
from attend_excite.methods.noise import MAX_NOISES, check_noise, chooses_noise, first_noise
from attend_excite.methods.stable_diffusion import StableDiffusion
from attend_excite.methods.structure import StructureDiffusion
from attend_excite.models.hindrances import refuse_hindrances
from attend_excite.models.model import Model, fitting_batch_size, offloaded_afterwards, prepared
from attend_excite.models.reading import warn_of_cut, warn_of_unknown_words
from attend_excite.pictures import Beginning, beginning
from attend_excite.schedulers import (
    begin_at,
    check_scheduler,
    first_step,
    noised,
    scheduler_for_run,
    seed_noise,
    shift_carrier,
    steps_made,
    without_warm_up,
)
from attend_excite.subjects import (
    Prompt,
    Subjects,
    Syntax,
    checked_syntax,
    foreign_instructions,
    locate_in,
    parse,
    words_of,
)
from attend_excite.trace import Trace, TraceStep, findings_of, updates_of
from attend_excite.turns import turn_of

# What torch's generators take.
_MAX_SEED = 2**64 - 1

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

    def only(self, index: int) -> Generation:
        """One of the images alone, with all that is known of it."""
        maps = self._maps
        if maps is not None:
            locate = maps.locate
            # The words of its own prompt, whatever stood before it.
            maps = replace(
                maps,
                values=maps.values[[index]],
                locate=lambda _, word: locate(index, word),
                words=tuple(words_of(self.prompts[index].text)),
            )
        return Generation(
            images=[self.images[index]] if self.images else [],
            prompts=[self.prompts[index]],
            seeds=[self.seeds[index]],
            nsfw=[self.nsfw[index]],
            trace=[self.trace[index]],
            latents=self.latents[[index]],
            _maps=maps,
        )


@torch.inference_mode(False)  # a caller's would forbid the gradients
@torch.no_grad()
def generate(
    model: Model,
    prompt: str | Sequence[str],
    *,
    method: Method | None = None,
    subjects: Subjects | Sequence[Subjects | None] | None = None,
    syntax: Syntax = "plain",
    seeds: int | Iterable[int] = (0,),
    steps: int | None = None,
    scheduler: str | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float | None = None,
    negative_prompt: str | None = "",
    height: int | None = None,
    width: int | None = None,
    image: Image.Image | str | Path | None = None,
    strength: float | None = None,
    mask: Image.Image | str | Path | None = None,
    best_of: int = 1,
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
        syntax: "a1111" reads prompt and negative prompt as A1111 does: weights in brackets, and chunks of 75
            tokens where they are longer (see `a1111`); the subjects are then the nouns, or named. For Stable
            Diffusion 1, 2 and XL, and methods that don't encode parts of the prompt by themselves.
        seeds: one or more, each 0 or more.
        steps: denoising steps, 1 or more; None: as many as are usual for the model, 50 for Stable Diffusion.
        scheduler: another than the model's own, on the same noise schedule: "ddim", "dpm++", ... (see
            `schedulers.scheduler_names`); None: its own.
        guidance_scale: of classifier-free guidance, 1 or less (Z-Image: 0): none; or of the guidance that is
            distilled into the model, as in FLUX. None: what is usual for the model, 7.5 for Stable Diffusion.
        true_cfg_scale: of classifier-free guidance beside distilled guidance, above 1; None: none.
        negative_prompt: what the unconditional half of the guidance sees, for all prompts; None: nothing.
        height: in pixels, a multiple of the autoencoder's factor (8); None: the model's own.
        width: likewise.
        image: a picture to begin from, or its path, in place of noise alone. Without height and width it is
            drawn in its own size, cut to what can be drawn; else it is scaled to fill them.
        strength: how much of it is made anew, above 0 to 1: the run makes this share of the steps, the last
            ones, and the recipe's fractions are of those. 1: nothing of it is left where is drawn. None: 0.8.
        mask: white where is drawn, black where the picture's latents and pixels stay as they are, to the bit;
            shades of grey mix pixels. None: everywhere.
        best_of: noises that are tried for each picture, the seed's own first: each is looked at early in
            the run (`Recipe.choose_at`) without a gradient, and the one whose loss is lowest then, by the
            method's recipe or else the model's, is drawn: not with every method the same. 1: the seed's own.
        batch_size: pictures in one pass; "auto": as many as should fit in memory. A batch that runs out
            of it all the same starts again with half as many.
        maps: keep the attention of every step: see `Generation.maps`. True: of the layers that nursing
            reads; (height, width): of the layers whose maps have this size, as 32x32 or 8x8.
        decode: make images of the latents.
        progress: show a bar of steps.
        callback: called after every step; what it raises ends the run and leaves the model as it was.

    One generation at a time is made with a model: a second thread waits for its turn. Warns of what will not
    be read (words beyond the context, words a small model never saw, instructions to other programs), and
    of nursing that came to nothing (`Trace.findings`).

    Raises:
        ValueError: an argument is out of its range, a subject cannot be found, or what was made is NaN.
    """
    method = AttendAndExcite() if method is None else method
    if isinstance(method, type) or not hasattr(method, "attach"):
        raise ValueError(f"the method is {method!r}: give one that is made, as AttendAndExcite()")
    seeds = _seeds(seeds)
    refuse_hindrances(model.network)
    family = model.family
    size = _latent_size(model, height, width)
    begin = beginning(image, strength, mask, height=height, width=width, multiple=family.size_factor)
    if begin is not None:
        size = _latent_size(model, *begin.size)
    steps = model.steps if steps is None else steps
    require(hasattr(steps, "__index__") and steps >= 1, "steps", steps, "a whole number, 1 or more")
    for what, scale in (("guidance_scale", guidance_scale or 0), ("true_cfg_scale", true_cfg_scale or 0)):
        fine = isinstance(scale, Real) and 0 <= scale < math.inf
        require(fine, what, scale, "a number, 0 or more, and finite")
    if guidance_scale and not family.takes_guidance:
        warnings.warn(
            f"{model.name} has no guidance to set: {guidance_scale:g} changes nothing", stacklevel=2
        )
    guidance_scale = family.defaults.guidance_scale if guidance_scale is None else guidance_scale
    made = steps if begin is None else steps_made(model.pipeline.scheduler, steps, begin.strength)
    if isinstance(method, AttendAndExcite) and 0 < made < family.defaults.fewest_steps:
        warnings.warn(
            f"of {made} steps nursing has hardly one in which it could do anything: give "
            f"{family.defaults.fewest_steps} or more",
            stacklevel=2,
        )
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
    require(isinstance(negative_prompt, str), "negative_prompt", negative_prompt, "one text for all prompts")
    check_scheduler(scheduler)
    counted = batch_size == "auto" or (hasattr(batch_size, "__index__") and batch_size >= 1)
    require(counted, "batch_size", batch_size, '1 or more, or "auto"')
    checked_syntax(syntax)
    negative_chunks = _negative_chunks(model, method, negative_prompt) if syntax == "a1111" else None
    fine = hasattr(best_of, "__index__") and 1 <= best_of <= MAX_NOISES
    require(fine, "best_of", best_of, f"a whole number, 1 to {MAX_NOISES}")
    check_noise(model, method, best_of, from_picture=begin is not None)
    prompts = parse_all(model, prompt, subjects, method, syntax, needed=best_of > 1)
    if method.uses_subjects and min(map_size(size, model.attention_downsampling)) < 2:
        least = 2 * model.attention_downsampling * family.pixels_per_cell
        raise ValueError(f"the picture is too small for attention maps: make it {least} pixels wide and high")
    if method.attends_to_prompt:  # others say themselves what they encode
        texts = [parsed.text for parsed in prompts]
        if syntax == "plain":
            warn_of_cut(model, texts)
        if decode:  # there is a picture to be disappointed by
            warn_of_unknown_words(model, texts)
    if negative_prompt and syntax == "plain":
        warn_of_cut(model, [negative_prompt], "the negative prompt")
        if instructions := foreign_instructions(negative_prompt):
            warnings.warn(f"in the negative prompt, {instructions}", stacklevel=1)
    map_downsampling = _map_downsampling(model, size, maps) if maps else None

    jobs = [(parsed, seed) for parsed in prompts for seed in seeds]
    in_one_pass = fitting_batch_size(model, size) if batch_size == "auto" else batch_size
    chooses = chooses_noise(model, method, best_of)
    results: list[_Result] = []
    original: Tensor | None = None
    with (
        turn_of(model.network),
        tqdm(disable=not progress, unit="step", leave=False) as bar,
        offloaded_afterwards(model.pipeline),
    ):
        start = 0
        while start < len(jobs):
            # Texts of as many chunks, which one pass can take.
            alike = partial(_as_many_chunks, jobs[start])
            batch = list(takewhile(alike, jobs[start : start + in_one_pass]))
            done = bar.n
            own = scheduler_for_run(model.pipeline.scheduler, scheduler)
            run = _encode(
                model,
                [parsed for parsed, _ in batch],
                size,
                cfg_scale,
                negative_prompt,
                distilled,
                own if begin is None else without_warm_up(own),
                negative_chunks,
            )
            run.map_downsampling = map_downsampling
            family.set_timesteps(run.scheduler, steps, size)
            if begin is not None:
                original = family.latents_of(begin.pixels()) if original is None else original
                run.start = _start(run, begin, original, steps)
            iterations = len(run.timesteps)
            seed_noise(run.scheduler, [seed for _, seed in batch])
            bar.total = done + iterations * -(-(len(jobs) - start) // in_one_pass)
            after_step = _reporter(bar, callback, range(start, start + len(batch)), iterations)
            generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
            noise = _noise(model, size, generators, run.latents_dtype)
            others = [torch.Generator().manual_seed(_seed_of_others(seed)) for _, seed in batch]
            draw = partial(_noise, model, size, others, run.latents_dtype)
            try:
                bar.set_description_str("choosing the noise" if chooses else "")
                noise = first_noise(run, method, noise, draw, generators, best_of, denoise)
                bar.set_description_str("")
                latents, seconds = denoise(run, method, noise, generators, after_step=after_step)
            except (RuntimeError, MemoryError) as error:
                if batch_size != "auto" or len(batch) == 1 or not is_out_of_memory(error):
                    raise
                in_one_pass, bar.n = len(batch) // 2, done
                continue
            timesteps = [float(timestep) for timestep in run.timesteps]
            images, flagged = family.decode(latents) if decode else ([], None)
            nsfw = [False] * len(batch) if flagged is None else [bool(flag) for flag in flagged]
            if begin is not None and decode:
                seen = zip(images, nsfw, strict=True)
                images = [image if black else begin.pasted(image) for image, black in seen]
            traces = traces_of(run, timesteps, seconds)
            results.append(_Result(images, nsfw, traces, latents.cpu(), run.maps, run.columns))
            start += len(batch)

    traces = [trace for result in results for trace in result.trace]
    warn_of_findings(traces)
    return Generation(
        images=[image for result in results for image in result.images],
        prompts=[parsed for parsed, _ in jobs],
        seeds=[seed for _, seed in jobs],
        nsfw=[flag for result in results for flag in result.nsfw],
        trace=traces,
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
    steps: int | None = None,
) -> tuple[Tensor, list[float]]:
    """The denoising loop, for a batch.

    Args:
        run: the batch; its scheduler has its timesteps set.
        method: what happens at a step.
        noise: (B, C, H, W) standard normal, float32 or wider.
        generators: for the noise that stochastic schedulers add, one for all images or one each.
        eta: the share of added noise in DDIM (Song et al.), 0 to 1; other schedulers have none.
        after_step: called with the step's index and timestep and the new latents.
        steps: only so many of the iterations; None: all.

    Returns:
        The denoised latents (B, C, H, W), and the seconds that each iteration took.

    Raises:
        ValueError: latents became NaN or infinite.
    """
    scheduler = run.scheduler
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"eta": eta, "generator": list(generators) if isinstance(generators, Sequence) else generators}
    extra = {name: value for name, value in extra.items() if name in accepted}
    start, timesteps = run.start, run.timesteps
    if start is not None and start.index:
        latents = noised(scheduler, start.latents, noise, timesteps[0])
    else:
        # Flow matching starts from the noise as it is, and its schedulers have no word for that.
        latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    carry = shift_carrier(scheduler)
    seconds: list[float] = []
    with turn_of(run.model.network), prepared(run.model.network), method.attach(run) as step:
        for index, timestep in enumerate(timesteps[:steps]):
            began = time.perf_counter()
            shifted, output = step(latents, Step(index, timestep))
            carry(None if shifted is latents else shifted - latents)
            latents = scheduler.step(output, timestep, shifted, **extra, return_dict=False)[0]
            if start is not None and start.cells is not None:
                kept = start.latents
                if index + 1 < len(timesteps):
                    kept = noised(scheduler, kept, noise, timesteps[index + 1])
                latents = torch.where(start.cells, latents, kept)
            parts = {
                "latents given to the model": shifted,
                "model's output": output,
                "scheduler's step": latents,
            }
            if "eta" in extra and eta > 1 and not latents.isfinite().all():
                raise ValueError(f"eta is {eta}, and the latents became NaN: give 0 to 1")
            check_finite(f"at step {index} of {len(timesteps)}, timestep {float(timestep):g}", parts)
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


def parse_all(
    model: Model,
    prompt: str | Sequence[str],
    subjects: Subjects | Sequence[Subjects | None] | None,
    method: Method,
    syntax: Syntax = "plain",
    *,
    needed: bool = False,
) -> list[Prompt]:
    """The prompts with their subjects: see `generate` for what may be given.

    Raises:
        ValueError: a subject cannot be found, or they don't fit the prompts.
    """
    several = isinstance(prompt, Iterable) and not isinstance(prompt, str)
    texts: list[Any] = list(prompt) if several else [prompt]
    fine = len(texts) > 0 and all(isinstance(text, str) for text in texts)
    require(fine, "prompt", prompt, "a text, or several")
    everywhere = [None] * len(texts)
    given: Any = (everywhere if subjects is None else subjects) if several else [subjects]
    wanted: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    fine = isinstance(given, Iterable) and not isinstance(given, str | Mapping)
    if not fine or any(
        not isinstance(named, Iterable | None) or (several and isinstance(named, str)) for named in wanted
    ):
        raise ValueError(
            f"subjects is {subjects}: it must be a list, like ['cat', 'frog'], and with several prompts a "
            "list of such lists, one a prompt"
        )
    if len(wanted) != len(texts):
        raise ValueError(f"{len(texts)} prompts but subjects for {len(wanted)}: give a list a prompt")
    if not (method.uses_subjects or needed):
        wanted = [()] * len(texts)
    elif any(isinstance(named, Sized) and not len(named) for named in wanted):
        raise ValueError(
            f"{method.title} needs a subject: name at least one, or leave subjects out to take the nouns"
        )
    streams = model.family.streams()
    return [parse(text, streams, named, syntax) for text, named in zip(texts, wanted, strict=True)]


def _negative_chunks(model: Model, method: Method, negative: str) -> tuple[Chunk, ...]:
    """Those of a negative prompt in A1111's syntax; (): it is empty.

    Raises:
        ValueError: the model or the method can't go with that syntax.
    """
    model.family.require_chunks()
    at: Any = method
    while at is not None:
        if isinstance(at, ComposableDiffusion | StructureDiffusion):
            raise ValueError(f"{at.title} encodes parts of the prompt by itself: leave A1111's syntax out")
        at = getattr(at, "base", None)
    if not negative.strip():
        return ()
    return parse(negative, model.family.streams(), (), "a1111").chunks


def _as_many_chunks(first: tuple[Prompt, int], job: tuple[Prompt, int]) -> bool:
    return len(first[0].chunks) == len(job[0].chunks)


def _seeds(seeds: Any) -> list[int]:
    """A list of seeds; numpy's integers, and arrays of them, are as good as Python's."""
    try:
        found = [operator.index(seed) for seed in (seeds if isinstance(seeds, Iterable) else [seeds])]
    except TypeError:
        raise ValueError(f"seeds is {seeds!r}: it must be one or more whole numbers") from None
    fine = len(found) > 0 and min(found) >= 0 and max(found) <= _MAX_SEED
    require(fine, "seeds", seeds, f"one or more numbers, none negative or above {_MAX_SEED}")
    return found


def warn_of_findings(traces: Sequence[Trace]) -> None:
    """Say each thing once, and of how many pictures."""
    counts = Counter(finding.sentence for trace in traces for finding in trace.findings)
    for sentence, count in counts.items():
        of = "" if len(traces) == 1 else f" (in {count} of {len(traces)} pictures)"
        warnings.warn(f"{sentence}{of}", stacklevel=2)


def _latent_size(model: Model, height: int | None, width: int | None) -> tuple[int, int]:
    factor, most = model.family.size_factor, model.family.longest_side
    height = model.default_size[0] if height is None else height
    width = model.default_size[1] if width is None else width
    for what, pixels in (("height", height), ("width", width)):
        fine = hasattr(pixels, "__index__") and pixels > 0 and pixels % factor == 0
        require(fine, what, pixels, f"a multiple of {factor} pixels")
        if most is not None:
            require(pixels <= most, what, pixels, f"at most {most} pixels: {model.name} has no places beyond")
    return model.latent_size(height, width)


def _map_downsampling(model: Model, latent: tuple[int, int], maps: bool | tuple[int, int]) -> int:
    if isinstance(maps, bool):
        return model.attention_downsampling
    require(isinstance(maps, Sequence) and len(maps) == 2, "maps", maps, "True, or (height, width)")
    return model.family.downsampling_for(latent, maps)


def _encode(
    model: Model,
    prompts: list[Prompt],
    size: tuple[int, int],
    guidance_scale: float,
    negative_prompt: str,
    distilled: float | None,
    scheduler: Any,
    negative_chunks: tuple[Chunk, ...] | None = None,
) -> Run:
    guided = guidance_scale > 1
    # What differs is encoded once.
    different = list({(prompt.text, prompt.chunks): prompt for prompt in prompts}.values())
    with turn_of(*(stream.tokenizer for stream in model.family.streams())):
        if negative_chunks is None:
            texts = [prompt.text for prompt in different]
            negative = negative_prompt if guided else None
            text, empty = model.family.encode(texts, negative, distilled, size)
        else:
            chunks = [prompt.chunks for prompt in different]
            text, empty = model.family.encode_chunks(chunks, negative_chunks if guided else None, size)
    known = [(prompt.text, prompt.chunks) for prompt in different]
    rows = [known.index((prompt.text, prompt.chunks)) for prompt in prompts]
    return Run(
        model=model,
        prompts=tuple(prompts),
        text=text[rows],
        empty_text=None if empty is None else empty[rows],
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        size=size,
        negative=negative_prompt,
        distilled=distilled,
        dominant_token=lambda word, positions: _dominant_token(model, word, positions, size),
    )


def _start(run: Run, begin: Beginning, original: Tensor, steps: int) -> Start:
    """Where a run begins from a picture with these latents (1, C, H, W); its scheduler is set to that."""
    first = first_step(run.scheduler, steps, begin.strength)
    if first:
        begin_at(run.scheduler, first)
    cells = begin.cells(run.size)
    latents = original.to(run.latents_dtype).expand(len(run.prompts), -1, -1, -1)
    return Start(latents, first, None if cells is None else cells.to(latents.device))


def _dominant_token(model: Model, prompt: str, positions: tuple[int, ...], size: tuple[int, int]) -> int:
    """Which of a word's tokens most attention goes to when the model draws the word alone (Appendix A.2), no
    larger than the latents' (height, width) of the run that asks, which memory is there for."""
    cell = model.family.pixels_per_cell
    height, width = (min(own, asked * cell) for own, asked in zip(model.default_size, size, strict=True))
    drawn = generate(
        model,
        prompt,
        method=StableDiffusion(),
        height=height,
        width=width,
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


def _seed_of_others(seed: int) -> int:
    """Of the noises that are tried beside a seed's own, whose generator gives the scheduler's noise next."""
    return (seed + 0x9E3779B97F4A7C15) % 2**64


def _reporter(
    bar: tqdm[Any], callback: Callback | None, images: range, iterations: int
) -> Callable[[int, Tensor, Tensor], None]:
    def after_step(index: int, timestep: Tensor, latents: Tensor) -> None:
        bar.update()
        if callback is not None:
            callback(StepEvent(index, iterations, float(timestep), images, latents))

    return after_step


def traces_of(run: Run, timesteps: Sequence[float], seconds: Sequence[float]) -> list[Trace]:
    """What happened to each image of a batch, by the timestep and the time that each iteration took."""
    traces: list[Trace] = []
    for row, prompt in enumerate(run.prompts):
        names = [group.text for group in prompt.groups]
        noise = run.noises[row] if run.noises else None
        steps = tuple(
            TraceStep(index, timestep, took, updates_of(run.visits.get(index, []), row, names))
            for index, (timestep, took) in enumerate(zip(timesteps, seconds, strict=True))
        )
        if run.nursed is None:
            traces.append(Trace(steps, noise=noise))
        else:
            found = findings_of(steps, prompt.groups, run.nursed.goal)
            traces.append(Trace(steps, run.nursed.tokens[row], found, noise))
    return traces


def _attention_maps(model: Model, prompts: list[Prompt], results: list[_Result]) -> AttentionMaps:
    if not all(result.maps for result in results):
        raise ValueError(
            "there are no maps: the method must predict with run.predict_guided, which keeps them"
        )

    def find(image: int, word: str) -> Sequence[int]:
        return locate_in(word, prompts[image], model.family.streams())

    words = tuple(words_of(prompts[0].text))
    if results[0].columns is None:
        stacked = [torch.stack(result.maps, dim=1) for result in results]
        # Batches of fewer chunks have fewer columns.
        most = max(maps.shape[-1] for maps in stacked)
        values = torch.cat([F.pad(maps, (0, most - maps.shape[-1])) for maps in stacked])
        return AttentionMaps(values, find, words=words)
    # Batches keep the columns of their own longest prompts; what a batch hasn't, nobody attended to.
    columns = tuple(sorted({column for result in results for column in result.columns or ()}))
    values = []
    for result in results:
        maps = torch.stack(result.maps, dim=1)
        wide = maps.new_zeros(*maps.shape[:-1], len(columns))
        wide[..., [columns.index(column) for column in result.columns or ()]] = maps
        values.append(wide)
    return AttentionMaps(torch.cat(values), find, columns, words)

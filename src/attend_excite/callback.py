"""For people with a diffusers pipeline: nursing from its `callback_on_step_end`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from attend_excite.generate import parse_all, traces_of, warn_of_findings
from attend_excite.methods.attend_excite import AttendAndExcite
from attend_excite.methods.base import Run, Step
from attend_excite.methods.noise import refuse_search
from attend_excite.methods.stable_diffusion import StableDiffusion
from attend_excite.models.families import is_served
from attend_excite.models.hindrances import refuse_hindrances
from attend_excite.models.loading import load
from attend_excite.models.model import Model, prepared
from attend_excite.models.reading import warn_of_cut
from attend_excite.schedulers import refuse_correctors, shift_carrier
from attend_excite.subjects import Prompt, Subjects
from attend_excite.turns import turn_of

StepEnd = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
"""(pipeline, index of the step, timestep, {"latents": ...}) -> {"latents": ...}"""


def nursing_callback(
    pipeline: DiffusionPipeline,
    prompt: str | Sequence[str],
    *,
    subjects: Subjects | Sequence[Subjects | None] | None = None,
    method: AttendAndExcite | None = None,
    height: int | None = None,
    width: int | None = None,
) -> StepEnd:
    """Attend-and-Excite for a pipeline of diffusers, to be given to it as `callback_on_step_end`.

        callback = nursing_callback(pipe, prompt, subjects=["cat", "frog"])
        pipe(prompt, callback_on_step_end=callback).images[0]

    It is called after a step, and nurses the latents for the next one. So the first step of a run goes
    without: the noise itself is not nursed, nor refined where the recipe refines at the very beginning. From
    the second step on the latents are those that `generate` would make if it left the first one plain (in
    float32: the pipeline's loop rounds them to the model's precision at each step). In
    image-to-image and inpainting it nurses from the second of the steps that are left.

    It sees no more than the latents. The prompt is encoded once more, as the pipeline does if told nothing
    but `prompt`: a second prompt, `clip_skip`, embeddings of one's own, `cross_attention_kwargs`, or another
    size than the picture's in SDXL's conditioning, FLUX.2 klein's pictures beside the text, change the
    picture, and not what is nursed for. (So tell
    FLUX.1 schnell `max_sequence_length=256`, which its authors give, and its pipeline doesn't.) Of a word
    of several tokens the strongest counts, as with `AttendAndExcite(word_tokens="max")`. Nothing of the run
    is kept beside the picture; what nursing did in vain is warned of after the last step.

    Args:
        pipeline: the one that will be called, left as it is: of an architecture that is served, from text or
            from a picture. With it the callback can be used for any number of runs, one after another.
        prompt: as the pipeline will be told; several: as many pictures of each.
        subjects: as in `generate`.
        method: with a recipe or an objective; None: the model's recipe.
        height: of the picture in pixels, for pipelines that pack their latents (FLUX, Qwen-Image); None: it
            is a square.
        width: likewise.

    Raises:
        ValueError: the pipeline can't be nursed, a subject cannot be found, or, in the run, its scheduler
            would lose what is nursed.
    """
    method = AttendAndExcite() if method is None else method
    if not isinstance(method, AttendAndExcite) or method.base != StableDiffusion():
        raise ValueError(
            "the method must be an AttendAndExcite without a base: it's the pipeline that denoises"
        )
    method = replace(method, word_tokens="max")
    model = load(_from_text(pipeline))
    if "callback_on_step_end" not in signature(type(pipeline).__call__).parameters:
        raise ValueError(
            f"{type(pipeline).__name__} calls nothing at the end of a step: draw with "
            "load(pipeline).generate(...) instead"
        )
    refuse_search(model, method)
    prompts = parse_unmarked(model, prompt, subjects, method)
    warn_of_cut(model, [parsed.text for parsed in prompts])
    run: Run | None = None
    nurse: Callable[[Tensor, Step], Tensor]
    timesteps: Tensor

    @torch.inference_mode(False)  # a caller's would forbid the gradients
    @torch.no_grad()
    def after_step(pipe: Any, index: int, timestep: Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        nonlocal run, nurse, timesteps
        latents = kept["latents"]
        if index == 0:
            refuse_hindrances(model.network)
            refuse_correctors(pipe.scheduler)
            timesteps = _made(pipe, timestep)
            size = _latent_size(model, latents, height, width)
            run = _run(model, prompts, pipe, size, len(latents))
            nurse = method.nursing(run, len(timesteps))
        if run is None:
            raise ValueError("the callback was not there after the first step of the run")
        if index == len(timesteps) - 1:
            times = [float(each) for each in timesteps]
            warn_of_findings(traces_of(run, times, [0.0] * len(times)))
            return kept
        kept["latents"] = nursed_in_its_loop(run, nurse, latents, Step(index + 1, timesteps[index + 1]))
        return kept

    return after_step


def parse_unmarked(
    model: Model,
    prompt: str | Sequence[str],
    subjects: Subjects | Sequence[Subjects | None] | None,
    method: AttendAndExcite,
) -> list[Prompt]:
    """The prompts of a loop of diffusers' own, which would draw brackets.

    Raises:
        ValueError: there are some, or a subject cannot be found.
    """
    prompts = parse_all(model, prompt, subjects, method)
    for parsed, text in zip(prompts, [prompt] if isinstance(prompt, str) else prompt, strict=True):
        if parsed.text != text:
            raise ValueError(
                f"the brackets in {text!r} would be drawn as text: take them out, and name the subjects with "
                "subjects=[...]"
            )
    return prompts


def nursed_in_its_loop(
    run: Run, nurse: Callable[[Tensor, Step], Tensor], latents: Tensor, step: Step
) -> Tensor:
    """What becomes of the latents of a loop of diffusers' own, as it has them; its scheduler is told.

    Args:
        run: the batch, with that loop's scheduler.
        nurse: as `AttendAndExcite.nursing` gives it.
        latents: packed or not, of any precision. They are left as they are.
        step: for which they are nursed.
    """
    family = run.model.family
    before = family.from_its_loop(latents, run.size).to(run.latents_dtype)
    with turn_of(family.network), prepared(family.network):
        after = nurse(before, step)
    if after is before:
        return latents
    shifted = family.as_its_loop_has_them(after)
    shift_carrier(run.scheduler)(shifted - family.as_its_loop_has_them(before))
    return shifted.to(latents.dtype)


def _made(pipe: Any, first: Tensor) -> Tensor:
    """The timesteps of a run whose first step is made: image-to-image leaves out those before, and a base
    model before a refiner those after."""
    timesteps = pipe.scheduler.timesteps
    at = getattr(pipe.scheduler, "step_index", None)
    begin = len(timesteps) - pipe.num_timesteps if at is None else at - 1
    if timesteps[begin] != first:  # PNDM has one of its timesteps twice, and may be stopped early
        begin = int((timesteps == first).nonzero()[0])
    return timesteps[begin : begin + pipe.num_timesteps]


def _from_text(pipeline: Any) -> Any:
    """The pipeline, or one from text of the same parts."""
    if not isinstance(pipeline, DiffusionPipeline) or any(
        is_served(kind.__name__) for kind in type(pipeline).__mro__
    ):
        return pipeline
    try:
        return AutoPipelineForText2Image.from_pipe(pipeline)
    except ValueError:  # there is none: then it's refused by its own name
        return pipeline


def _run(model: Model, prompts: list[Prompt], pipe: Any, size: tuple[int, int], images: int) -> Run:
    each, rest = divmod(images, len(prompts))
    if rest:
        raise ValueError(
            f"{images} pictures of {len(prompts)} prompts: tell the callback the prompts of the pipeline"
        )
    distilled = pipe.guidance_scale if model.family.distilled_guidance else None
    texts = [prompt.text for prompt in prompts]
    # With offloading the network is on the accelerator now: it makes room for the text encoders.
    pipe.maybe_free_model_hooks()
    with turn_of(*(stream.tokenizer for stream in model.family.streams())):
        text, _ = model.family.encode(texts, None, distilled, size)
    rows = [row for row in range(len(prompts)) for _ in range(each)]
    return Run(
        model=model,
        prompts=tuple(prompts[row] for row in rows),
        text=text[rows],
        empty_text=None,
        guidance_scale=1.0,
        scheduler=pipe.scheduler,
        size=size,
        distilled=distilled,
    )


def _latent_size(model: Model, latents: Tensor, height: int | None, width: int | None) -> tuple[int, int]:
    if latents.ndim == 4:
        return latents.shape[-2], latents.shape[-1]
    cells = latents[0].numel() // model.family.latent_channels
    if height is None or width is None:
        height = width = math.isqrt(cells) * model.family.pixels_per_cell
    factor = model.family.size_factor  # to which these pipelines round down
    size = model.latent_size(height // factor * factor, width // factor * factor)
    if math.prod(size) != cells:
        raise ValueError("packed latents don't say how high and wide they are: give height and width")
    return size

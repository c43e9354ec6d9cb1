"""Attend-and-Excite in the host's own sampling: what a nursed MODEL does to a run, and what it keeps."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors

from attend_excite.attention.maps import AttentionMaps
from attend_excite.attention.record import Layout
from attend_excite.columns import tables_of
from attend_excite.guidance.nurse import Visit
from attend_excite.guidance.nursing import Nursing
from attend_excite.guidance.objectives import Recorded
from attend_excite.guidance.schedule import Recipe, StepPlan
from attend_excite.subjects import columns_of
from attend_excite.trace import TraceStep, findings_of, updates_of

from .architectures import Architecture, architecture_of
from .hearing import Heard, Hearing, by_fused_attention
from .prompts import Asked, Reading, read
from .steps import step_calls
from .weights import differentiable

KEY = "attend_excite"
"""The name of what is this package's own among the host's options, wrappers and conditionings."""


@dataclass(frozen=True)
class Settings:
    """What a node was told.

    Attributes:
        asked: the prompt and its subjects.
        reading: the same as the model sees it.
        architecture: of the model.
        recipe: the numbers, in full.
        strength: factor on the step size, 0 or more; 0: nothing is shifted.
        last_step: the last step whose latents are shifted, from 1; 0: as the recipe says.
        downsampling: latent cells per cell of the maps along one side.
    """

    asked: Asked
    reading: Reading
    architecture: Architecture
    recipe: Recipe
    strength: float
    last_step: int
    downsampling: int

    def plan(self, steps: int) -> tuple[StepPlan, ...]:
        """What to do at each of so many steps."""
        if self.strength == 0:
            return ()
        recipe = replace(self.recipe, step_size=self.strength * self.recipe.step_size)
        if self.last_step:
            altered = min(self.last_step / steps, 1.0)
            kept = tuple(each for each in recipe.thresholds if each[0] < altered)
            recipe = replace(recipe, altered=altered, start=min(recipe.start, altered), thresholds=kept)
        return recipe.plan(steps)


@dataclass
class Kept:
    """What a nursed MODEL keeps of its last run.

    Attributes:
        maps: of its subjects, from every step, where it got to its end.
        visits: by the step, what nursing did.
        samples: the latents that it gave.
    """

    maps: AttentionMaps | None = None
    visits: Mapping[int, Sequence[Visit]] | None = None
    samples: Tensor | None = None


def nursed(model: Any, asked: Asked, recipe: str, strength: float, last_step: int) -> Any:
    """A MODEL under which the host's samplers nurse their latents; the one given stays as it is.

    Args:
        model: the host's.
        asked: the prompt, which the sampler is to be given as its positive one, and the subjects.
        recipe: "recommended" or one of the library's names.
        strength: see `Settings`.
        last_step: likewise.

    Raises:
        ValueError: the model can't be nursed, or the subjects aren't in the prompt.
    """
    from comfy.patcher_extension import WrappersMP

    from attend_excite.models.families.base import family_data

    if model.attachments.get(KEY) is not None:
        raise ValueError("this MODEL is nursed already: connect the one from before Attend-and-Excite")
    architecture = architecture_of(model)
    reading = read(asked, architecture.tables)
    defaults = family_data()[architecture.family]
    numbers = Recipe.named(recipe, Recipe.from_dict(defaults.recipe))
    downsampling = defaults.attention_downsampling
    settings = Settings(asked, reading, architecture, numbers, strength, last_step, downsampling)
    kept = Kept()

    def sample(
        executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, *args: Any, **kwargs: Any
    ) -> Any:
        run = _Run(settings, executor.class_obj)
        samples = executor(noise, latent_image, run.watching(sampler), *args, **kwargs)
        run.report()
        kept.maps, kept.visits, kept.samples = run.maps(), run.visits, samples.cpu()
        return samples

    own = model.clone()
    own.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample)
    own.set_attachments(KEY, kept)
    return own


class _Run:
    """One run of the host's sampler.

    Args:
        settings: of the node.
        guider: the host's, which knows model and conditionings.
    """

    def __init__(self, settings: Settings, guider: Any) -> None:
        self._settings, self._guider = settings, guider
        self._nursing: Nursing | None = None
        self._begins: tuple[int, ...] = ()
        self._calls = 0
        self._sigmas: set[float] = set()
        self._last: str | None = None
        self._maps: list[Tensor] = []
        self.visits: dict[int, list[Visit]] = {}
        reading = settings.reading
        kept: Sequence[int] = range(len(reading.columns))
        if settings.architecture.joint is not None:
            # Padding is attended to, and means nothing.
            spans = (reading.prompt.spans, *(spans for _, spans in reading.prompt.further))
            kept = [
                stream.start + position
                for stream, own in zip(reading.streams, spans, strict=True)
                for position in range(len(own))
            ]
        self._kept = tuple(kept)
        starts = [stream.start for stream in reading.streams]
        subjects = {group.text: columns_of(group, starts) for group in reading.prompt.groups}
        self._subjects = subjects
        self._shown = tuple(sorted({column for columns in subjects.values() for column in columns}))

    def watching(self, sampler: Any) -> Any:
        """The sampler, whose calls of the model are watched; the caller's stays as it is."""
        function = getattr(sampler, "sampler_function", None)
        if function is None:
            raise ValueError(
                f"latents can't be nursed under {type(sampler).__name__}, which hides its steps: choose "
                "one of the KSampler's samplers"
            )

        def sample(
            model: Any,
            noise: Tensor,
            sigmas: Tensor,
            extra_args: dict[str, Any] | None = None,
            callback: Any = None,
            disable: Any = None,
            **options: Any,
        ) -> Tensor:
            self._prepare(function, model, noise, sigmas, extra_args or {}, options)
            watched = _Watched(model, self._call)
            return function(
                watched, noise, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options
            )

        own = copy.copy(sampler)
        own.sampler_function = sample
        return own

    def _prepare(
        self,
        function: Callable[..., Tensor],
        model: Any,
        noise: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        if noise.ndim != 4:
            raise ValueError("pictures are nursed, and these latents are those of a film or of sound")
        settings = self._settings
        if settings.strength == 0 or len(sigmas) < 2:
            return

        def altered(steps: int) -> list[int]:
            return [index for index, plan in enumerate(settings.plan(steps)) if not plan.idle]

        name = getattr(function, "__name__", "?").removeprefix("sample_").removesuffix("_function")
        self._begins = step_calls(function, model, sigmas, altered, extra_args, options, name)
        # Not in inference mode, where the host is: gradients are to pass.
        with torch.inference_mode(False):
            tables = tables_of(
                [settings.reading.prompt] * len(noise),
                settings.reading.streams,
                settings.recipe,
                columns=self._kept,
                shared=settings.architecture.joint is not None,
                device=noise.device,
            )
            self._nursing = Nursing(settings.recipe, settings.plan(len(self._begins)), tables)

    def _call(self, model: Any, latents: Tensor, sigma: Tensor, extra: dict[str, Any]) -> Tensor:
        """A call of the model by the sampler."""
        number, self._calls = self._calls, self._calls + 1
        level = float(sigma.flatten()[0])
        begins = number in self._begins if self._nursing is not None else level not in self._sigmas
        self._sigmas.add(level)
        positive = self._positive(level) if begins else None
        if positive is None:
            return model(latents, sigma, **extra)
        if self._nursing is not None:
            step = self._begins.index(number)
            if not self._nursing.plans[step].idle:
                self._nurse(model, step, latents, sigma, extra, positive)
        return self._heard(model, latents, sigma, extra, positive)

    def _positive(self, level: float) -> dict[str, Any] | None:
        """The conditioning whose attention is meant; None: none has a say at this noise level."""
        found = [each for each in self._guider.conds.get("positive") or () if _has_a_say(each, level)]
        marked = [each for each in found if KEY in each and each[KEY].text == self._settings.asked.text]
        if not found:
            return None
        if not marked and (len(found) > 1 or KEY in found[0]):
            raise ValueError(
                "the sampler's positive prompt isn't the one that Attend-and-Excite was given, nor is that "
                "among several: encode it with the node Subjects, and connect that to both"
            )
        chosen = (marked or found)[0]
        for what, why in (
            ("area", "is for a part of the picture"),
            ("reference_latents", "has pictures beside it"),
        ):
            if chosen.get(what) is not None:
                raise ValueError(f"a positive prompt that {why} isn't nursed: take that out")
        states = chosen["model_conds"]["c_crossattn"].cond
        if states.shape[1] < self._settings.reading.width:
            raise ValueError(
                f"the sampler's positive prompt has {states.shape[1]} tokens, and the one that "
                f"Attend-and-Excite was given {self._settings.reading.width}: give both one text and CLIP"
            )
        return chosen

    def _nurse(
        self,
        model: Any,
        step: int,
        latents: Tensor,
        sigma: Tensor,
        extra: dict[str, Any],
        positive: dict[str, Any],
    ) -> None:
        """Shift the sampler's own latents, in place: what it holds is what it goes on from."""
        nursing = self._nursing
        assert nursing is not None
        network = self._guider.inner_model
        # Some of the host's blocks change in place what the way back needs.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            differentiable(network),
            allow_mutation_on_saved_tensors(),
        ):
            # What the host made in inference mode can't be kept for the way back; copies can.
            own = {name: each.clone() if isinstance(each, Tensor) else each for name, each in extra.items()}
            begin, level = latents.clone(), sigma.clone()
            scale = vp_scale(self._guider.model_patcher.get_model_object("model_sampling"), level)
            wide = torch.promote_types(begin.dtype, torch.float32)
            images = "self-attention" in nursing.plans[step].needs

            def look(scaled: Tensor, rows: Tensor) -> Recorded:
                moved = (scaled / scale).to(begin.dtype)
                # All of the batch, since masks and ControlNets are all of the batch's.
                whole = moved if len(rows) == len(begin) else begin.index_copy(0, rows, moved)
                hearing = self._hearing(begin, positive, self._kept, images=images, last=self._last)
                options = self._only(positive, own, hearing)
                by_fused_attention(options)
                with suppress(Heard):
                    model(whole, level, **{**own, "model_options": options})
                self._last = hearing.latest
                maps = _all_of(hearing)
                return Recorded(maps[rows], hearing.recording.self_average()[rows] if images else None)

            before = begin.to(wide) * scale
            after, visits = nursing.step(step, before, look)
            shift = ((before - after) / scale).to(latents.dtype)
        self.visits[step] = visits
        if visits:
            with torch.inference_mode():
                latents.sub_(shift)

    def _only(self, positive: dict[str, Any], extra: dict[str, Any], hearing: Hearing) -> dict[str, Any]:
        """The options of a pass that works out the positive prompt alone, for its maps."""
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.patcher_extension import WrappersMP, add_wrapper_with_key, copy_nested_dicts

        throw_exception_if_processing_interrupted()
        options = copy_nested_dicts(extra.get("model_options", {}))
        hearing.among(options)

        def look(
            executor: Any, model: Any, _: Any, latents: Tensor, sigma: Tensor, told: dict[str, Any]
        ) -> None:
            executor(model, [[_without_control_gradient(positive)]], latents, sigma, told)
            raise Heard

        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, look, options, is_model_options=True)
        return options

    def _heard(
        self, model: Any, latents: Tensor, sigma: Tensor, extra: dict[str, Any], positive: dict[str, Any]
    ) -> Tensor:
        """The model's answer, the same to the bit, and the maps of it."""
        from comfy.patcher_extension import copy_nested_dicts

        options = copy_nested_dicts(extra.get("model_options", {}))
        hearing = self._hearing(latents, positive, self._shown)
        hearing.among(options)
        answer = model(latents, sigma, **{**extra, "model_options": options})
        if hearing.recording.layers:
            self._maps.append(hearing.recording.average().cpu())
        return answer

    def _hearing(
        self,
        latents: Tensor,
        positive: dict[str, Any],
        kept: Sequence[int],
        *,
        images: bool = False,
        last: str | None = None,
    ) -> Hearing:
        settings = self._settings
        size = (latents.shape[-2], latents.shape[-1])
        columns = [settings.reading.columns[position] for position in kept]
        layout = Layout(size, columns, settings.architecture.joint, settings.downsampling)
        network = self._guider.inner_model.diffusion_model
        uuid = positive["uuid"]
        return Hearing(settings.architecture, network, layout, uuid, images=images, last=last)

    def report(self) -> None:
        """Say what nursing did in vain, or overdid, as the command line does."""
        prompt, names = self._settings.reading.prompt, [g.text for g in self._settings.reading.prompt.groups]
        rows = {row for visits in self.visits.values() for visit in visits for row in visit.rows.tolist()}
        for image in sorted(rows):
            steps = [
                TraceStep(index, 0.0, 0.0, updates_of(visits, image, names))
                for index, visits in self.visits.items()
            ]
            for finding in findings_of(steps, prompt.groups, self._settings.recipe.goal):
                logging.warning("Attend-and-Excite, picture %d: %s", image + 1, finding.sentence)

    def maps(self) -> AttentionMaps | None:
        """The maps of the run's subjects; None: none were heard."""
        if not self._maps:
            return None

        def locate(_: int, word: str) -> tuple[int, ...]:
            if word not in self._subjects:
                raise ValueError(f"{word!r} is no subject")
            return self._subjects[word]

        return AttentionMaps(torch.stack(self._maps, dim=1), locate, self._shown, tuple(self._subjects))


class _Watched:
    """The model as a sampler is handed it."""

    def __init__(self, model: Any, call: Callable[[Any, Tensor, Tensor, dict[str, Any]], Tensor]) -> None:
        self._model, self._call = model, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, latents: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        return self._call(self._model, latents, sigma, extra)


def vp_scale(sampling: Any, sigma: Tensor) -> float:
    """What brings the host's latents, x = s x0 + n noise, to unit variance: 1 / sqrt(s^2 + n^2).

    Diffusion models have s = 1 and n = sigma there, flow matching s = 1 - sigma; a shift in that scale goes
    as far as in the library (`attend_excite.schedulers.vp_scale`).

    Args:
        sampling: the host's `model_sampling`.
        sigma: (B,) the noise level, the same for all.
    """
    level = sigma.flatten()[:1].cpu().double()  # which MPS doesn't have
    one, nought = level.new_ones(1, 1, 1, 1), level.new_zeros(1, 1, 1, 1)
    picture = float(sampling.noise_scaling(level, nought.clone(), one)) * getattr(sampling, "sigma_data", 1.0)
    noise = float(sampling.noise_scaling(level, one.clone(), nought))
    return (picture**2 + noise**2) ** -0.5


def _all_of(hearing: Hearing) -> Tensor:
    if not hearing.recording.layers:
        raise ValueError(
            "no attention of the model was heard at the size of the maps: another node answers in its place, "
            "as those that cache do, or the picture is too small; take that node out, or enlarge the picture"
        )
    return hearing.recording.average()


def _has_a_say(conditioning: Mapping[str, Any], level: float) -> bool:
    start, end = conditioning.get("timestep_start"), conditioning.get("timestep_end")
    return (start is None or level <= float(start)) and (end is None or level >= float(end))


def _without_control_gradient(conditioning: dict[str, Any]) -> dict[str, Any]:
    """What a ControlNet adds is taken as it is: the way back doesn't go through it."""
    control = conditioning.get("control")
    return conditioning if control is None else {**conditioning, "control": _Control(control)}


class _Control:
    def __init__(self, control: Any) -> None:
        self._control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def get_control(self, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self._control.get_control(latents.detach(), *args, **kwargs)

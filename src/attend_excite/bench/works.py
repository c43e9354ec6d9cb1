"""What is timed: the same piece of work, done by us and by diffusers' deprecated class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    pipeline_stable_diffusion_attend_and_excite as deprecated,
)
from torch import Tensor

from attend_excite.attention.places import Place
from attend_excite.attention.record import record
from attend_excite.bench.sizes import Subject
from attend_excite.guidance.nurse import Measure, Measurement, nurse
from attend_excite.guidance.objective import (
    SubjectTokens,
    most_neglected,
    subject_attention,
    subject_losses,
    token_probabilities,
)
from attend_excite.guidance.schedule import Recipe, StepPlan
from attend_excite.models.families.unet import cross_attention_places
from attend_excite.models.model import prepared

Work = Callable[[], Tensor]

_TOKENS = [2, 5]
_TIMESTEP = 981
# A run makes them one after the other, and only the first finds the memory that another pass has given back.
_PASSES_A_TURN = 3
# So long that the gradient isn't lost in the rounding of the latents that it is taken from.
_LONG_STEP = 1e4
_REFINEMENTS = 3
_BATCH = 8


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        name: what is measured.
        works: by whose it is: "ours", "diffusers", or "plain", ours without any nursing.
        units: how many of what is measured one call of a work holds.
    """

    name: str
    works: Mapping[str, Work]
    units: int = 1


def figures(subject: Subject, steps: int) -> list[Figure]:
    """All that is timed, for whole images of so many steps."""
    ours_and_plain = ("ours", "diffusers", "plain")
    found = [
        Figure("guidance step", guidance_steps(subject, _PASSES_A_TURN), _PASSES_A_TURN),
        Figure("refinement visit", refined_step(subject, _REFINEMENTS), _REFINEMENTS + 1),
        Figure("CFG pass", _cfg_passes(subject, _PASSES_A_TURN), _PASSES_A_TURN),
        Figure(
            f"whole image, {steps} steps, no refinement",
            {whose: whole_images(subject, whose, steps) for whose in ours_and_plain},
        ),
        Figure(
            f"whole image, {steps} steps, every refinement at its cap",
            {whose: whole_images(subject, whose, steps, _capped(steps)) for whose in ("ours", "diffusers")},
        ),
    ]
    if subject.size == "stickers":
        ours = whole_images(subject, "ours", steps, images=_BATCH)
        plain = whole_images(subject, "plain", steps, images=_BATCH)
        one_by_one = whole_images(subject, "diffusers", steps)
        together = whole_images(subject, "diffusers", steps, images=_BATCH)
        found += [
            Figure(
                f"image of a batch of {_BATCH}, diffusers one by one",
                {"ours": ours, "diffusers": _repeated(one_by_one, _BATCH), "plain": plain},
                _BATCH,
            ),
            Figure(
                f"image of a batch of {_BATCH}, diffusers too",
                {"ours": ours, "diffusers": together, "plain": plain},
                _BATCH,
            ),
        ]
    return found


def _repeated(work: Work, times: int) -> Work:
    return lambda: torch.cat([work() for _ in range(times)])


def guidance_steps(subject: Subject, steps: int = 1, images: int = 1) -> dict[str, Work]:
    """So many guidance passes in a row, each with its gradient, as either loop makes them.

    Theirs takes one image. A work gives the gradient of the last.
    """

    places = _places(subject)

    def ours() -> Tensor:
        noise, text = subject.noise(images), subject.text.expand(images, -1, -1)
        plan = StepPlan(
            _LONG_STEP, alters=True, threshold=None, max_refinements=0, update_after_refinement=True
        )
        with prepared(subject.ours.unet):
            for _ in range(steps):
                with _measuring(subject, text, places) as measure:
                    gradient = (noise - nurse(noise, measure, plan)[0]) / _LONG_STEP
        return gradient

    def theirs() -> Tensor:
        with _controlled(subject) as pipeline:
            for _ in range(steps):
                latents = subject.noise(1).requires_grad_(True)
                loss = _their_loss(pipeline, subject, latents)
                gradient = (
                    latents - pipeline._update_latent(latents, loss, _LONG_STEP)
                ).detach() / _LONG_STEP
        return gradient

    return {"ours": ours, "diffusers": theirs}


def whole_images(
    subject: Subject, whose: str, steps: int, thresholds: Mapping[int, float] | None = None, images: int = 1
) -> Work:
    """A whole run to the latents (images, C, H, W), half of whose steps are altered.

    Args:
        subject: the weights and inputs.
        whose: "ours", "diffusers", or "plain", ours without any nursing.
        steps: denoising steps.
        thresholds: step -> the attention demanded there; None: no refinement.
        images: pictures in one batch.
    """
    pipeline: Any = subject.theirs if whose == "diffusers" else subject.ours

    def work() -> Tensor:
        return pipeline(
            None,
            _TOKENS,
            height=subject.latent_side * 8,
            width=subject.latent_side * 8,
            num_inference_steps=steps,
            latents=subject.noise(images),
            num_images_per_prompt=images,
            prompt_embeds=subject.text,
            negative_prompt_embeds=subject.empty_text,
            max_iter_to_alter=0 if whose == "plain" else steps // 2,
            thresholds=thresholds or {},
            scale_factor=subject.step_size,
            attn_res=(subject.map_side, subject.map_side),
            output_type="latent",
        ).images

    return work


def shortened_forward(subject: Subject) -> None:
    """The forward half of our guidance pass."""
    with torch.no_grad(), record(subject.ours.unet, _places(subject), stop_after_last=True) as recording:
        recording.forward(subject.noise(1), _TIMESTEP, encoder_hidden_states=subject.text)


def plain_pass(subject: Subject) -> Tensor:
    """The pass of classifier-free guidance for one image, with whatever processors the UNet has."""
    with torch.no_grad():
        latents = torch.cat([subject.noise(1)] * 2)
        text = torch.cat([subject.empty_text, subject.text])
        return subject.ours.unet(latents, _TIMESTEP, encoder_hidden_states=text).sample


def _cfg_passes(subject: Subject, passes: int) -> dict[str, Work]:
    def passed() -> Tensor:
        return [plain_pass(subject) for _ in range(passes)][-1]

    def ours() -> Tensor:
        with prepared(subject.ours.unet):
            return passed()

    def theirs() -> Tensor:
        with _controlled(subject):
            return passed()

    return {"ours": ours, "diffusers": theirs}


def refined_step(subject: Subject, refinements: int) -> dict[str, Work]:
    """A step whose threshold no map reaches, by either loop: so many refinements, and the ordinary update.

    A work gives the shifted latents.
    """

    places = _places(subject)

    def ours() -> Tensor:
        plan = StepPlan(
            subject.step_size,
            alters=True,
            threshold=1.0,
            max_refinements=refinements,
            update_after_refinement=True,
        )
        with prepared(subject.ours.unet), _measuring(subject, subject.text, places) as measure:
            return nurse(subject.noise(1), measure, plan, torch.zeros(1, len(_TOKENS)))[0]

    def theirs() -> Tensor:
        size = subject.step_size
        with _controlled(subject) as pipeline:
            latents = subject.noise(1).requires_grad_(True)
            loss = _their_loss(pipeline, subject, latents)
            loss, latents, _ = pipeline._perform_iterative_refinement_step(
                latents, _TOKENS, loss, 1.0, subject.text, size, _TIMESTEP, max_refinement_steps=refinements
            )
            # As in its loop: a loss of 0 is no tensor, and there is nothing to gain.
            return (pipeline._update_latent(latents, loss, size) if loss else latents).detach()

    return {"ours": ours, "diffusers": theirs}


def _capped(steps: int) -> dict[int, float]:
    """Thresholds that no map reaches, at the recipe's three places: every refinement runs to its cap."""
    return {int(fraction * steps): 1.0 for fraction in (0.0, 0.2, 0.4)}


def _places(subject: Subject) -> tuple[Place, ...]:
    return cross_attention_places(subject.ours.unet, subject.latent_side // subject.map_side)


@contextmanager
def _measuring(subject: Subject, text: Tensor, places: tuple[Place, ...]) -> Iterator[Measure]:
    """Our measurement, as `methods.attend_excite` makes it."""
    recipe = Recipe.named("official")
    tokens = SubjectTokens.stack(
        [[[token] for token in _TOKENS]] * len(text), last=[text.shape[1] - 2] * len(text)
    )
    with record(subject.ours.unet, places, stop_after_last=True) as recording:

        def measure(latents: Tensor, rows: Tensor) -> Measurement:
            recording.forward(latents, _TIMESTEP, encoder_hidden_states=text[rows])
            chosen = tokens.rows(rows)
            probabilities = token_probabilities(recording.average(), chosen.last, recipe.temperature)
            attention = subject_attention(probabilities, chosen, recipe.sigma)
            losses = subject_losses(attention, chosen)
            return Measurement(attention, losses, most_neglected(losses))

        yield measure


@contextmanager
def _controlled(subject: Subject) -> Iterator[Any]:
    """The deprecated class as its loop finds it: its own processors in all layers."""
    pipeline: Any = subject.theirs
    before = pipeline.unet.attn_processors
    pipeline.attention_store = deprecated.AttentionStore((subject.map_side, subject.map_side))
    pipeline.register_attention_control()
    try:
        yield pipeline
    finally:
        pipeline.unet.set_attn_processor(before)


def _their_loss(pipeline: Any, subject: Subject, latents: Tensor) -> Tensor:
    pipeline.unet(latents, _TIMESTEP, encoder_hidden_states=subject.text)
    pipeline.unet.zero_grad()
    return pipeline._compute_loss(pipeline._aggregate_and_get_max_attention_per_token(_TOKENS))

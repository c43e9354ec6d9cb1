"""What every architecture must do: the contract of `models.families`, on tiny random models of each."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attend_excite import (
    AttendAndExcite,
    AttentionReweighting,
    ComposableDiffusion,
    Model,
    StableDiffusion,
    StructureDiffusion,
    load,
)
from attend_excite.attention.places import map_size
from attend_excite.attention.record import record
from attend_excite.generate import _encode
from attend_excite.methods.base import Run, Step
from attend_excite.models import load_streams
from attend_excite.schedulers import scheduler_for_run
from attend_excite.subjects import Subject, parse
from tests.families import (
    FAMILIES,
    FLOW_SCHEDULERS,
    SCHEDULERS,
    as_compared,
    flux,
    flux_2_klein,
    keep_wide,
    model_of,
    pipeline_options,
    pixart_alpha,
)

PROMPT = "a cat and a frog"
STEPS = 4
NAMES = list(FAMILIES)


@pytest.fixture(autouse=True)
def _no_rounding_inside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "z-image" in request.node.name and "own_pipeline" in request.node.name:  # which insists on float32
        return
    keep_wide(monkeypatch)


def run_of(model: Model, prompts: list[str], guidance: float = 1.0, steps: int = STEPS) -> Run:
    """A batch as `generate` makes it, ready for its first step."""
    parsed = [parse(prompt, model.family.streams()) for prompt in prompts]
    size = model.latent_size(*model.default_size)
    distilled = guidance if model.family.distilled_guidance else None
    scheduler = scheduler_for_run(model.pipeline.scheduler)
    run = _encode(model, parsed, size, 1.0 if distilled else guidance, "", distilled, scheduler)
    model.family.set_timesteps(run.scheduler, steps, size)
    return run


def noise_of(model: Model, images: int = 1) -> Tensor:
    """(images, C, H, W) standard normal, always the same."""
    shape = (model.family.latent_channels, *model.latent_size(*model.default_size))
    generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
    return torch.stack([torch.randn(shape, generator=each, dtype=torch.float64) for each in generators])


def first_step(run: Run) -> Step:
    return Step(0, run.scheduler.timesteps[0])


def _by_both(
    model: Model, steps: int, guidance: float, size: tuple[int, int], output_type: str = "latent"
) -> tuple[Tensor, Any]:
    """What the plain loop and the family's own pipeline make of the same noise: our latents, its output."""
    height, width = size
    sides = {"height": height, "width": width}
    ours = model.generate(
        PROMPT,
        method=StableDiffusion(),
        seeds=[3],
        steps=steps,
        guidance_scale=guidance,
        decode=False,
        progress=False,
        **sides,
    ).latents
    shape = (1, model.family.latent_channels, *model.latent_size(height, width))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pipeline = copy.copy(model.pipeline)
    pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
    theirs = pipeline(
        prompt=PROMPT,
        num_inference_steps=steps,
        latents=model.family.as_the_pipeline_has_them(noise),
        output_type=output_type,
        **sides,
        **pipeline_options(pipeline, guidance),
    ).images
    return ours, theirs


def test_models_that_have_learnt_to_do_without_guidance_say_so() -> None:
    for pipeline in (flux(guidance=False), flux_2_klein(distilled=True)):
        model = load(as_compared(pipeline))
        assert (model.family.defaults.steps, model.family.defaults.guidance_scale) == (4, 0.0)
        make = functools.partial(model.generate, PROMPT, method=StableDiffusion(), steps=1, decode=False)
        with pytest.warns(UserWarning, match="has no guidance to set: 4 changes nothing"):
            guided = make(guidance_scale=4.0, progress=False).latents
        assert torch.equal(guided, make(progress=False).latents)


def _assert_as_its_pipeline(model: Model, guidance: float, size: tuple[int, int]) -> None:
    ours, theirs = _by_both(model, STEPS, guidance, size)
    if theirs.shape == ours.shape or theirs.ndim == 3:
        ours = model.family.as_the_pipeline_has_them(ours)
    else:  # it gives them as its autoencoder takes them
        ours = model.family.unscaled(ours)
    # Some pipelines hold latents in float32.
    tolerance = 1e-10 if theirs.dtype == torch.float64 else 5e-5
    torch.testing.assert_close(ours.to(theirs), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("guidance", "size"), [(1.0, None), (4.0, None), (4.0, (128, 96))])
@pytest.mark.parametrize("name", NAMES)
def test_the_plain_loop_is_the_familys_own_pipeline(
    name: str, guidance: float, size: tuple[int, int] | None
) -> None:
    model = model_of(name)
    _assert_as_its_pipeline(model, guidance, size or model.default_size)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["pixart", "stable-diffusion", "stable-diffusion-xl"])
def test_so_it_is_with_other_schedulers(name: str, scheduler: str) -> None:
    pipeline = copy.copy(model_of(name).pipeline)
    pipeline.scheduler = SCHEDULERS[scheduler]()
    model = load(pipeline)
    _assert_as_its_pipeline(model, 4.0, model.default_size)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("stable-diffusion-3", "DPM++"),
        ("stable-diffusion-3", "UniPC"),
        ("sana", "DPM++"),
        ("sana", "UniPC"),
        # Their pipelines, and those of Qwen-Image and Z-Image, hand over sigmas, which few schedulers take.
        ("flux", "UniPC"),
        ("flux-2-klein", "UniPC"),
    ],
)
def test_so_it_is_with_other_schedulers_of_flows(name: str, scheduler: str) -> None:
    pipeline = copy.copy(model_of(name).pipeline)
    pipeline.scheduler = FLOW_SCHEDULERS[scheduler]()
    model = load(pipeline)
    _assert_as_its_pipeline(model, 4.0, model.default_size)


def test_so_it_is_where_pixart_is_told_the_size() -> None:
    _assert_as_its_pipeline(load(as_compared(pixart_alpha())), 4.0, (128, 64))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_decoded_as_by_the_familys_own_pipeline(name: str) -> None:
    model = model_of(name)
    latents, pixels = _by_both(model, 1, 1.0, model.default_size, "np")
    with torch.no_grad():
        ours, _ = model.family.decode(latents, "np")
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(pixels))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_as_good_as_a_pipeline(name: str, tmp_path: Path) -> None:
    pipeline = as_compared(FAMILIES[name]())
    pipeline.save_pretrained(tmp_path)
    models = [load(pipeline), load(tmp_path, device="cpu", dtype="float64")]
    for small in {"default_sample_size", "tokenizer_max_length"} & vars(pipeline).keys():  # not in a folder
        setattr(models[1].pipeline, small, getattr(pipeline, small))
    drawn = [
        model.generate(PROMPT, method=StableDiffusion(), steps=1, decode=False, progress=False).latents
        for model in models
    ]
    torch.testing.assert_close(*drawn)
    # Its words can be looked at without its weights.
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert parse(PROMPT, load_streams(tmp_path)) == parse(PROMPT, load(pipeline).family.streams())


@pytest.mark.parametrize("name", NAMES)
def test_classifier_free_guidance_beside_distilled_guidance_is_the_pipelines(name: str) -> None:
    model = model_of(name)
    if not model.family.distilled_guidance:
        with pytest.raises(ValueError, match="true_cfg_scale is for models whose guidance is distilled"):
            model.generate(PROMPT, true_cfg_scale=2.0)
        return
    if "true_cfg_scale" not in inspect.signature(model.pipeline.__call__).parameters:
        pytest.skip("its pipeline has none")
    height, width = model.default_size
    options: dict[str, Any] = {"negative_prompt": "a dog", "true_cfg_scale": 3.0, "guidance_scale": 2.0}
    ours = model.generate(
        PROMPT, method=StableDiffusion(), steps=2, **options, decode=False, progress=False
    ).latents
    theirs = copy.copy(model.pipeline)(
        PROMPT,
        height=height,
        width=width,
        num_inference_steps=2,
        latents=model.family.as_the_pipeline_has_them(noise_of(model)),
        output_type="latent",
        **pipeline_options(model.pipeline, 2.0) | options,
    ).images
    ours = model.family.as_the_pipeline_has_them(ours)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def _naive(run: Run, latents: Tensor, place: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The whole attention of one layer, written out: (b, heads, rows, columns)."""
    found: list[Tensor] = []
    fused = F.scaled_dot_product_attention

    def written_out(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **rest: Any) -> Tensor:
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(scores)
            scores = scores + attn_mask
        if looking:
            found.append(scores.softmax(dim=-1))
        return fused(query, key, value, attn_mask=attn_mask, **rest)

    looking: list[bool] = []
    layer = run.model.network.get_submodule(place)
    handles = [
        layer.register_forward_pre_hook(lambda *_: looking.append(True)),
        layer.register_forward_hook(lambda *_: looking.clear()),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", written_out)
        run.predict(latents, first_step(run), run.text)
    for handle in handles:
        handle.remove()
    return found[0]


@pytest.mark.parametrize("name", NAMES)
def test_recorded_maps_are_the_softmax_of_the_whole_attention(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name)
    run = run_of(model, [PROMPT, "a lion with a red crown"])
    latents = noise_of(model, 2)
    places = model.places()
    layout = run.layout(model.attention_downsampling)
    with record(model.network, places, layout=layout) as recording:
        run.predict(latents, first_step(run), run.text)
    columns = run.columns
    height, width = map_size(layout.size, places[0].downsampling)
    patches = height * width
    for place in places:
        whole = _naive(run, latents, place.name, monkeypatch)
        torch.testing.assert_close(whole.sum(dim=-1), torch.ones_like(whole[..., 0]))
        assert whole.shape[-2] >= patches
        rows, first = whole, 0
        if model.family.joint == "image-first":
            rows, first = whole[:, :, :patches], patches
        elif model.family.joint == "text-first":
            rows = whole[:, :, -patches:]
        kept = [first + column for column in columns] if columns else slice(None)
        expected = rows[..., kept].mean(dim=1)
        torch.testing.assert_close(recording.layers[place.name].mean(dim=1), expected, rtol=0, atol=1e-12)


def test_single_stream_blocks_are_read_where_somebody_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "single_transformer_blocks.0.attn"
    model = dataclasses.replace(model_of("flux"), layers=(name,))
    run = run_of(model, [PROMPT])
    layout = run.layout(model.attention_downsampling)
    with record(model.network, model.places(), layout=layout) as recording:
        run.predict(noise_of(model), first_step(run), run.text)
    patches = map_size(layout.size, 2)[0] * map_size(layout.size, 2)[1]
    whole = _naive(run, noise_of(model), name, monkeypatch)
    expected = whole[:, :, -patches:, list(run.columns or ())]
    torch.testing.assert_close(recording.layers[name], expected.mean(dim=1, keepdim=True), rtol=0, atol=1e-12)


def model_of_one_text(name: str) -> Model:
    """For tests of what can't take keys and values from several texts."""
    if model_of(name).family.sets_refusal is None:
        pytest.skip("its keys and values can be those of several texts")
    return model_of(name)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_reweighting_multiplies_the_maps_that_the_image_sees(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written out: the softmax of every layer with text, its image rows times c in the subjects' columns."""
    model = model_of_one_text(name)
    run = run_of(model, [PROMPT, "a lion with a red crown"], 4.0)
    if run.empty_text is None:
        run = run_of(model, [PROMPT, "a lion with a red crown"])
    latents, columns = noise_of(model, 2), [[1, 4], [2]]
    text = run.text.states
    weights = torch.ones(text.shape[:2], dtype=torch.float64)
    for row, some in zip(weights, columns, strict=True):
        row[some] = 2.0
    with run.weighted_tokens(weights) as weigh:
        weighted = run.predict_guided(latents, first_step(run))
        weigh(torch.ones_like(weights))
        plain = run.predict_guided(latents, first_step(run))
    torch.testing.assert_close(plain, run.predict_guided(latents, first_step(run)), rtol=0, atol=1e-10)
    assert (weighted - plain).abs().max() > 1e-4

    height, width = map_size(run.size, model.places()[0].downsampling)
    patches = height * width
    joint = model.family.joint

    def written_out(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **_: Any) -> Tensor:
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
        maps = scores.softmax(dim=-1)
        if key.shape[-2] > patches if joint else key.shape[-2] == text.shape[1]:
            first = patches if joint == "image-first" else 0
            image = slice(-patches, None) if joint == "text-first" else slice(patches)
            for maps_of, some in zip(maps[-2:], columns, strict=True):
                maps_of[:, image, [first + column for column in some]] *= 2.0
        return maps @ value

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", written_out)
        expected = run.predict_guided(latents, first_step(run))
    torch.testing.assert_close(weighted, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_nursing_goes_on_top_of_reweighting(name: str) -> None:
    model = model_of_one_text(name)
    make = functools.partial(model.generate, PROMPT, steps=STEPS, decode=False, progress=False)
    recipe = dataclasses.replace(model.recipe, step_size=1.0, thresholds=())
    nursed = make(method=AttendAndExcite(recipe, base=AttentionReweighting(weight=1.0))).latents
    alone = make(method=AttendAndExcite(recipe)).latents
    torch.testing.assert_close(nursed, alone, rtol=0, atol=1e-6)  # some norms are worked out in float32


@pytest.mark.parametrize("name", NAMES)
def test_a_subjects_column_is_its_words(name: str) -> None:
    """Another word in its place changes its column's text, and the model's embedding there; swapped image
    and text, or a table's columns off by one, would show another's."""
    model = model_of(name)
    changed = []
    parsed = [parse(f"a red {word} and a bowl", model.family.streams(), [word]) for word in ("cat", "frog")]
    for at, stream in enumerate(model.family.streams()):
        group = parsed[0].groups[0]
        positions = group.further[at - 1] if at else group.positions
        tokens = parsed[0].further[at - 1][0] if at else parsed[0].tokens
        others = parsed[1].further[at - 1][0] if at else parsed[1].tokens
        assert [index for index, pair in enumerate(zip(tokens, others, strict=True)) if len({*pair}) > 1] == [
            *positions
        ]
        changed += [stream.start + position for position in positions]
    run = run_of(model, [prompt.text for prompt in parsed])
    difference = (run.text.states[0] - run.text.states[1]).abs().amax(dim=-1)
    # Before the word nothing is changed in a causal encoder, and at it most of all in any.
    for column in changed:
        assert difference[column] > 0


@pytest.mark.parametrize("name", NAMES)
def test_recording_changes_no_bit_and_the_shortened_pass_has_the_same_gradient(name: str) -> None:
    model = model_of(name)
    run = run_of(model, [PROMPT])
    places, layout = model.places(), run.layout(model.attention_downsampling)
    plain = run.predict(noise_of(model), first_step(run), run.text)
    gradients = []
    for stop in (False, True):
        latents = noise_of(model).requires_grad_(True)
        with record(model.network, places, layout=layout, stop_after_last=stop) as recording:
            recording.forward(**run.network_inputs(latents, first_step(run), run.text))
            weights = torch.linspace(0, 1, recording.average().numel(), dtype=torch.float64)
            loss = (recording.average().flatten() * weights).sum()
        gradients.append(torch.autograd.grad(loss, latents)[0])
        if not stop:
            with record(model.network, places, layout=layout):
                recorded = run.predict(noise_of(model), first_step(run), run.text)
            assert torch.equal(plain, recorded)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)

    def value(latents: Tensor) -> float:
        with record(model.network, places, layout=layout, stop_after_last=True) as recording, torch.no_grad():
            recording.forward(**run.network_inputs(latents, first_step(run), run.text))
        return float((recording.average().flatten() * weights).sum())

    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    step = 1e-5
    numeric = (value(latents + step * direction) - value(latents - step * direction)) / (2 * step)
    assert numeric == pytest.approx(float((gradients[0] * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_as_its_pictures_alone(name: str) -> None:
    """Refinement counts differ inside: half of the pictures are short of the attention demanded."""
    model = model_of(name)
    make = functools.partial(model.generate, decode=False, progress=False)
    prompts = [PROMPT, "a lion with a red crown"]
    nursed = AttendAndExcite(replace(model.recipe, thresholds=(), altered=1.0))
    once = make(prompts, seeds=[0, 1], steps=1, method=nursed)
    demanded = 1 - sum(sorted(trace.steps[0].updates[0].loss for trace in once.trace)[1:3]) / 2
    recipe = replace(model.recipe, step_size=2.0, thresholds=((0.0, demanded), (0.5, 0.6)), max_refinements=3)
    make = functools.partial(make, method=AttendAndExcite(recipe), steps=2, maps=True)
    together = make(prompts, seeds=[0, 1], batch_size=4)
    assert len({len(trace.steps[0].updates) for trace in together.trace}) > 1
    alone = [make(prompt, seeds=[seed], batch_size=1) for prompt in prompts for seed in (0, 1)]
    torch.testing.assert_close(
        together.latents, torch.cat([each.latents for each in alone]), rtol=0, atol=1e-8
    )
    for at, each in enumerate(alone):
        word = together.prompts[at].groups[0].text
        maps = together.maps.only(together.maps.locate(at, word)).values[at]
        single = each.maps.only(each.maps.locate(0, word)).values[0]
        torch.testing.assert_close(maps, single, rtol=0, atol=1e-8)
        counts = [len(step.updates) for step in together.trace[at].steps]
        assert counts == [len(step.updates) for step in each.trace[0].steps]


@pytest.mark.parametrize("name", NAMES)
def test_nursing_lowers_the_loss_of_the_most_neglected_subject(name: str) -> None:
    """By three small updates at the first step, all of which a threshold that nothing meets asks for."""
    model = model_of(name)
    recipe = replace(model.recipe, step_size=0.1, thresholds=((0.0, 1.0),), max_refinements=3)
    traces = model.generate(
        PROMPT,
        method=AttendAndExcite(recipe),
        seeds=range(20),
        batch_size=20,
        steps=1,
        decode=False,
        progress=False,
    ).trace
    losses = [[update.loss for update in trace.steps[0].updates] for trace in traces]
    assert sum(each[-1] < each[0] for each in losses) >= 19


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_in_the_model_after_an_exception(
    name: str, same_model: Callable[[Model], Callable[[], None]]
) -> None:
    model = model_of(name)
    # transformers puts hooks of its own into a text encoder when it is first used, and leaves them there.
    model.family.encode([PROMPT], None, None, model.latent_size(*model.default_size))
    check = same_model(model)
    method = AttendAndExcite(replace(model.recipe, thresholds=(), altered=1.0))
    leaves = [module for module in model.network.modules() if not [*module.children()]]
    picked = torch.randperm(len(leaves), generator=torch.Generator().manual_seed(0))[:20]
    reached = 0
    for at in picked:

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        handle = leaves[int(at)].register_forward_pre_hook(fail)
        try:
            model.generate(PROMPT, method=method, steps=1, decode=False, progress=False)
        except KeyboardInterrupt:
            reached += 1
        finally:
            handle.remove()
        check()
    assert reached >= 10


@pytest.mark.parametrize("name", NAMES)
def test_composable_diffusion_goes_with_every_family_that_has_classifier_free_guidance(name: str) -> None:
    model = model_of(name)
    make = functools.partial(model.generate, steps=2, decode=False, progress=False)
    if model.family.distilled_guidance:
        with pytest.raises(ValueError, match="true_cfg_scale"):
            make("a cat AND a frog", method=ComposableDiffusion())
        make = functools.partial(make, true_cfg_scale=4.0)
    else:
        make = functools.partial(make, guidance_scale=4.0)
    drawn = make("a cat AND a frog", method=ComposableDiffusion()).latents
    assert drawn.isfinite().all()
    half = 2.0 if model.family.distilled_guidance else model.family.weight_of_guidance(4.0) / 2
    single = make("a cat AND a cat", method=ComposableDiffusion([half, half])).latents
    plain = make("a cat", method=StableDiffusion()).latents
    torch.testing.assert_close(single, plain, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_methods_that_exchange_the_text_work_or_are_refused_with_the_reason(name: str) -> None:
    model = model_of(name)
    make = functools.partial(model.generate, "a cat", steps=2, decode=False, progress=False)
    if model.family.sets_refusal is not None:
        with pytest.raises(ValueError, match=f"^{re.escape(model.family.defaults.title)} .*: choose"):
            make(method=StructureDiffusion())
        return
    plain = make(method=StableDiffusion()).latents
    # A weight of one, and a phrase that says no more than the prompt, are the plain model.
    for method in (AttentionReweighting(1.0), StructureDiffusion(["a cat"], align="keys-and-values")):
        torch.testing.assert_close(make(method=method).latents, plain, rtol=0, atol=1e-8)
    for method in (AttentionReweighting(2.0), StructureDiffusion(["cat"])):
        assert (make(method=method).latents - plain).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["z-image", "pixart"])
def test_some_of_a_batch_have_a_shorter_text_than_all_of_it(name: str) -> None:
    """Z-Image's text is as long as the longest of a pass; who is refined alone may have a shorter one. PixArt
    masks what is longer, which the softmax over all tokens must not count either."""
    model = model_of(name)
    recipe = replace(
        model.recipe, thresholds=((0.0, 1.0),), max_refinements=2, prompt_tokens_only=name == "z-image"
    )
    prompts = [PROMPT, "a lion with a red crown" + " on the grass in the sun by the sea" * 6]
    options = {
        "method": AttendAndExcite(recipe),
        "steps": 1,
        "seeds": [0],
        "decode": False,
        "progress": False,
    }
    content = [Subject("lion", 0.0), Subject("crown", 0.0)]
    together = model.generate(prompts, subjects=[None, content], batch_size=2, **options)
    alone = model.generate(PROMPT, **options)
    assert [len(trace.steps[0].updates) for trace in together.trace] == [2, 1]
    torch.testing.assert_close(together.latents[:1], alone.latents, rtol=0, atol=1e-8)

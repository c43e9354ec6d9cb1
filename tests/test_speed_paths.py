"""What makes runs faster or leaner gives the same pictures; what approximates does what it says."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from attend_excite import (
    AttendAndExcite,
    Generation,
    Model,
    Recipe,
    StableDiffusion,
    StepEvent,
    cross_attention_places,
    load,
)
from attend_excite.attention.record import record
from attend_excite.bench.measure import distances, take_turns
from attend_excite.bench.report import save_chart, show
from attend_excite.bench.sizes import build
from attend_excite.bench.works import Figure, guidance_steps, refined_step
from attend_excite.methods.base import Denoise, Run
from attend_excite.models.model import fitting_batch_size
from attend_excite.models.page_faults import sparing_page_faults

PROMPT = "a cat and a frog"


@pytest.fixture
def small(tiny: Model) -> Model:
    """The tiny model with a UNet of two levels, which a test may change."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    ).double()
    for name, parameter in unet.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            parameter.data.mul_(4)
    parts = tiny.pipeline.components | {"unet": unet}
    return replace(
        load(StableDiffusionPipeline(**parts, requires_safety_checker=False)), attention_downsampling=1
    )


def _draw(model: Model, recipe: Recipe, seeds: int = 3, **options: object) -> Generation:
    method = AttendAndExcite(recipe)
    options = {"steps": 2, "decode": False, "progress": False, "method": method} | options
    return model.generate(PROMPT, seeds=range(seeds), **options)


def _refining(model: Model) -> Recipe:
    """A recipe under which, at the first step, one of the seeds 0 to 2 is refined and two are not."""
    recipe = replace(Recipe.named("official"), thresholds=(), max_refinements=3)
    found = _draw(model, recipe, steps=2)
    lowest = sorted(min(trace.steps[0].updates[0].attention.values()) for trace in found.trace)
    return replace(recipe, thresholds=((0.0, (lowest[0] + lowest[1]) / 2),))


@pytest.mark.parametrize(("images", "stride", "bias"), [(1, 1, True), (3, 1, False), (2, 2, True)])
def test_a_large_convolution_is_a_product_in_its_block_alone(images: int, stride: int, bias: bool) -> None:
    layer = nn.Conv2d(1024, 1024, 3, stride, padding=1, bias=bias).requires_grad_(False)
    pixels = torch.randn(images, 1024, 7, 4, requires_grad=True)

    def both() -> list[Tensor]:
        result = layer(pixels)
        return [result, *torch.autograd.grad(result.square().sum(), pixels)]

    expected = both()
    with suppress(KeyboardInterrupt), sparing_page_faults(layer):
        found = both()
        assert "forward" in vars(layer)
        raise KeyboardInterrupt
    assert "forward" not in vars(layer)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().std()))


def test_a_feed_forward_layer_makes_no_large_block_and_gives_the_same_bits() -> None:
    layer = FeedForward(32, mult=32, activation_fn="geglu").requires_grad_(False)
    tokens = torch.randn(3, 1500, 32, requires_grad=True)
    blocks: list[int] = []
    # What is widened is gated by its other half.
    layer.net[0].register_forward_hook(lambda _layer, _inputs, output: blocks.append(2 * output.nbytes))

    def both() -> list[Tensor]:
        result = layer(tokens)
        return [result, *torch.autograd.grad(result.square().sum(), tokens)]

    expected = both()
    assert max(blocks) > 32 * 2**20
    blocks.clear()
    with sparing_page_faults(layer):
        found = both()
    assert max(blocks) <= 32 * 2**20
    assert "forward" not in vars(layer)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(
    "recompile_limit" not in signature(torch.compile).parameters, reason="compiling needs torch 2.13"
)
def test_a_compiled_model_draws_the_same_and_is_compiled_once(small: Model) -> None:
    from torch._dynamo.utils import counters

    recipe = _refining(small)
    plain = _draw(small, recipe)
    assert [len(trace.steps[0].updates) > 1 for trace in plain.trace].count(True) == 1
    counters.clear()
    small.compile(backend="eager")
    compiled = _draw(small, recipe)
    torch.testing.assert_close(compiled.latents, plain.latents, rtol=1e-9, atol=1e-9)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    # Another batch and size: nothing is compiled again.
    _draw(small, recipe, seeds=5, width=192)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@dataclass(frozen=True)
class _Hungry:
    """Attend-and-Excite on a device whose memory holds two images."""

    nursing: AttendAndExcite
    error: Exception = field(default_factory=torch.OutOfMemoryError)
    name = "hungry"
    uses_subjects = True
    attends_to_prompt = True

    @contextmanager
    def attach(self, run: Run) -> Iterator[Denoise]:
        if len(run.prompts) > 2:
            raise self.error
        with self.nursing.attach(run) as denoise:
            yield denoise


# As torch says it of an accelerator, and of a CPU.
OUT_OF_MEMORY = (
    torch.OutOfMemoryError("out of memory"),
    RuntimeError("alloc: can't allocate memory: 12 bytes"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_that_does_not_fit_is_halved(tiny: Model, error: Exception) -> None:
    method = AttendAndExcite("no-refinement")
    hungry = _Hungry(method, error)
    events: list[StepEvent] = []
    drawn = _draw(tiny, Recipe.named("official"), 5, method=hungry, batch_size="auto", callback=events.append)
    assert [event.images for event in events if event.index == 0] == [range(2), range(2, 4), range(4, 5)]
    expected = _draw(tiny, Recipe.named("official"), 5, method=method)
    torch.testing.assert_close(drawn.latents, expected.latents, rtol=1e-9, atol=1e-9)
    with pytest.raises(type(error)):
        _draw(tiny, Recipe.named("official"), method=hungry)


def test_fewer_large_images_fit_than_small_ones(tiny: Model) -> None:
    fitting = [fitting_batch_size(tiny, (side, side)) for side in (8, 4096, 65536)]
    assert fitting == sorted(fitting, reverse=True)
    assert 1 == fitting[-1] <= fitting[0] <= 32


def _guided_steps(drawn: Generation) -> list[list[int]]:
    return [[step.index for step in trace.steps if step.updates] for trace in drawn.trace]


def test_only_every_second_step_is_guided(tiny: Model) -> None:
    recipe = replace(
        Recipe.named("official"), guide_every=2, thresholds=((0.17, 0.01),), max_refinements=1, altered=0.9
    )
    assert _guided_steps(_draw(tiny, recipe, 1, steps=6)) == [[0, 1, 2, 4]]


def test_an_image_whose_subjects_are_there_rests_and_the_others_do_not(tiny: Model) -> None:
    recipe = replace(Recipe.named("official"), altered=1.0, max_refinements=0)
    free = _draw(tiny, recipe, 2, steps=5)
    lowest = [[min(step.updates[0].attention.values()) for step in trace.steps] for trace in free.trace]
    assert max(lowest[0]) != max(lowest[1])
    above = int(min(lowest[1]) > min(lowest[0]))
    threshold = (min(lowest[0]) + min(lowest[1])) / 2
    recipe = replace(recipe, thresholds=((0.5, threshold),), rest_after=2)
    drawn = _draw(tiny, recipe, 2, steps=5)
    for steps, attention in zip(_guided_steps(drawn), lowest, strict=True):
        in_a_row = [value >= threshold for value in attention]
        rests = next((i + 2 for i in range(4) if in_a_row[i] and in_a_row[i + 1]), 5)
        assert steps == list(range(rests))
    assert _guided_steps(drawn)[above] == [0, 1]
    alone = [_draw(tiny, recipe, seeds=1, steps=5), _draw(tiny, recipe, 2, steps=5, batch_size=1)]
    torch.testing.assert_close(drawn.latents[:1], alone[0].latents, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(drawn.latents, alone[1].latents, rtol=1e-9, atol=1e-9)
    # In the last step that is looked at nothing is moved any more.
    last = drawn.trace[above].steps[1].updates
    assert [(update.shift, update.due) for update in last] == [(0, False)]


def test_an_image_rests_at_once_when_its_subjects_lead(tiny: Model) -> None:
    recipe = replace(Recipe.named("official"), altered=1.0, max_refinements=0, rest_after=1, rest_at=0.0)
    plain = _draw(tiny, recipe, method=StableDiffusion())
    # Every subject is ahead by -1 and more from the start, and by 1 never. (Where the memory lies that a sum
    # is taken in may turn its last bit.)
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)
    same(_draw(tiny, replace(recipe, rest_lead=-1.0)).latents, plain.latents)
    never = _draw(tiny, replace(recipe, rest_lead=1.0))
    same(never.latents, _draw(tiny, replace(recipe, rest_after=0)).latents)
    assert (never.latents - plain.latents).abs().max() > 1e-6


def test_a_bound_holds_over_a_run_and_a_late_start_leaves_the_beginning(tiny: Model) -> None:
    recipe = replace(Recipe.named("official"), altered=1.0, thresholds=((0.0, 0.2),), max_refinements=3)
    shifts = [u.shift for t in _draw(tiny, recipe).trace for step in t.steps for u in step.updates]
    bound = sorted(shifts)[len(shifts) // 2]
    capped = _draw(tiny, replace(recipe, max_shift=bound))
    assert max(u.shift for t in capped.trace for step in t.steps for u in step.updates) <= bound * (1 + 1e-9)
    late = _draw(tiny, replace(recipe, start=0.5), 1, steps=4)
    assert _guided_steps(late) == [[2, 3]]


def test_a_half_precision_run_stays_near_the_float32_one(stickers: Model) -> None:
    def path(model: Model) -> list[Tensor]:
        latents: list[Tensor] = []

        def keep(event: StepEvent) -> None:
            latents.append(event.latents)

        _draw(model, model.recipe, 1, steps=4, callback=keep)
        return latents

    half = load("stickers", device="cpu", dtype=torch.bfloat16)
    exact, rounded = path(stickers), path(half)
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).norm() / a.norm() < 0.1
    with record(half.network, cross_attention_places(half.network, 1), stop_after_last=True) as recording:
        sample = torch.randn(1, 4, 16, 16, dtype=torch.bfloat16)
        recording.forward(sample, 500, torch.randn(1, 77, 128, dtype=torch.bfloat16))
    assert recording.average().dtype == torch.float32


@pytest.mark.parametrize("offload", ["cpu_offload", "cpu_offload_with_hook"])
def test_an_offloaded_model_draws_the_same(small: Model, offload: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    recipe = _refining(small)
    expected = _draw(small, recipe)
    hooked: Callable = getattr(accelerate, offload)
    hooked(small.network, execution_device=torch.device("cpu"))
    drawn = _draw(small, recipe)
    assert torch.equal(drawn.latents, expected.latents)


def test_both_sides_of_the_bench_do_the_same() -> None:
    subject = build("stickers")
    shifted = {whose: work() for whose, work in refined_step(subject, 2).items()}
    torch.testing.assert_close(shifted["ours"], shifted["diffusers"], rtol=0, atol=1e-3)
    assert (shifted["ours"] - subject.noise(1)).abs().max() > 0.01
    apart = distances(subject)
    assert max(apart.values()) < 1e-3
    turns = take_turns(Figure("guidance step", guidance_steps(subject)), 2, lambda _: None)
    assert [len(seconds) for seconds in turns.values()] == [2, 2]


def test_the_bench_is_shown_and_drawn(tmp_path: Path) -> None:
    report = {
        "size": "quarter",
        "threads": 2,
        "relative distance": {"gradient": 1e-6},
        "GFLOP": {"guidance step": 100.0, "CFG pass": 200.0},
        "guidance step, MiB above the weights": {"ours": 100.0, "diffusers": 550.0},
        "matrix rate, GFLOP/s": 100.0,
        "seconds": {"guidance step": {"ours": [2.0, 2.0, 4.0], "diffusers": [5.0, 6.0, 8.0]}},
    }
    with io.StringIO() as written:
        show(report, Console(file=written, width=200))
        text = written.getvalue()
    assert all(part in text for part in ("2.00 (2.00 to 4.00)", "2.50 (2.00 to 3.00)", "5.50", "at 50% of"))
    save_chart(report, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.size[0] > 100

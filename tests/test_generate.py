"""Whole runs: batches, seeds, targets, precision, and what remains of them in the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import (
    StableDiffusionImg2ImgPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from attend_excite import (
    AttendAndExcite,
    Generation,
    Model,
    Recipe,
    StableDiffusion,
    StepEvent,
    Subject,
    load,
)
from attend_excite.methods.base import Denoise, Run, Step

CAT_AND_FROG = "a cat and a frog"
# A short step keeps a random network from turning the last bit into another picture.
GENTLE = AttendAndExcite(
    replace(Recipe.named("official"), step_size=2.0, thresholds=((0.0, 0.09), (0.2, 0.12)), max_refinements=5)
)


def _run(model: Model, prompt: str | list[str] = CAT_AND_FROG, **options: Any) -> Generation:
    fixed = {"method": GENTLE, "steps": 6, "decode": False, "progress": False}
    return model.generate(prompt, **(fixed | options))


def test_a_batch_of_four_equals_four_singles(tiny: Model) -> None:
    batch = _run(tiny, seeds=range(4))
    singles = [_run(tiny, seeds=seed) for seed in range(4)]
    torch.testing.assert_close(
        batch.latents, torch.cat([single.latents for single in singles]), rtol=1e-9, atol=1e-9
    )
    assert [trace.refinements for trace in batch.trace] == [single.trace[0].refinements for single in singles]
    assert len({str(trace.refinements) for trace in batch.trace}) > 1, "refinement counts should differ"


def test_prompts_with_their_own_subjects_in_one_batch(tiny: Model) -> None:
    both = _run(tiny, [CAT_AND_FROG, "a lion with a crown and a clock"], seeds=[0, 1])
    alone = _run(tiny, "a lion with a crown and a clock", seeds=[0, 1])
    torch.testing.assert_close(both.latents[2:], alone.latents, rtol=1e-9, atol=1e-9)
    assert list(both.trace[0].steps[0].updates[0].attention) == ["cat", "frog"]
    assert list(both.trace[3].steps[0].updates[0].attention) == ["lion", "crown", "clock"]
    assert both.seeds == [0, 1, 0, 1]


def test_the_same_seed_is_the_same_picture_to_the_bit(stickers: Model) -> None:
    first, second = (
        stickers.generate(CAT_AND_FROG, seeds=7, steps=3, progress=False).images[0] for _ in range(2)
    )
    assert first.tobytes() == second.tobytes()
    assert first.size == (128, 128)


def test_excited_attention_is_higher_than_plain(stickers: Model) -> None:
    """The effect itself, on the bundled model: the most neglected subject is attended to more."""
    watching = replace(stickers.recipe, step_size=1e-12, thresholds=())
    lowest = []
    for method in (AttendAndExcite(watching), AttendAndExcite()):
        run = _run(stickers, method=method, seeds=range(3), steps=8)
        lowest.append([min(trace.steps[2].updates[-1].attention.values()) for trace in run.trace])
    plain, excited = torch.tensor(lowest)
    assert excited.mean() > plain.mean()


def test_a_target_ends_the_excitement_and_a_negation_turns_it(tiny: Model) -> None:
    met = _run(tiny, subjects=[Subject("cat", target=0.001)])
    plain = _run(tiny, method=StableDiffusion())
    torch.testing.assert_close(met.latents, plain.latents, rtol=0, atol=1e-12)
    wanted = _run(tiny, subjects=["frog"]).trace[0].steps[0].updates
    unwanted = _run(tiny, subjects=["-frog"]).trace[0].steps[0].updates
    assert wanted[-1].attention["frog"] > wanted[0].attention["frog"]
    assert unwanted[0].loss == pytest.approx(wanted[0].attention["frog"])


def test_a_word_of_several_tokens_is_one_subject(tiny: Model) -> None:
    prompt = "an elephant with a sombrero"
    dominant = _run(tiny, prompt)
    largest = _run(tiny, prompt, method=replace(GENTLE, word_tokens="max"))
    assert list(dominant.trace[0].steps[0].updates[0].attention) == ["elephant", "sombrero"]
    seen = [run.trace[0].steps[0].updates[0].attention["sombrero"] for run in (dominant, largest)]
    assert seen[0] <= seen[1]
    size = tiny.latent_size(*tiny.default_size)
    assert tiny.dominant_tokens["an image of a sombrero", (5, 6), size] in (0, 1)


def test_a_word_with_a_hyphen_is_drawn_as_it_is_written(tiny: Model) -> None:
    found = _run(tiny, "a corgi and a t-shirt", subjects=["t-shirt"])
    assert list(found.trace[0].steps[0].updates[0].attention) == ["t-shirt"]
    # "an image of a t - shirt": the hyphen is no candidate.
    size = tiny.latent_size(*tiny.default_size)
    assert tiny.dominant_tokens["an image of a t-shirt", (5, 7), size] in (0, 1)


def test_it_loads_and_draws_in_a_callers_inference_mode_too(tiny: Model, tiny_folder: Path) -> None:
    expected = _run(tiny)
    with torch.inference_mode():
        assert torch.equal(_run(tiny).latents, expected.latents)
        assert _run(load(tiny_folder)).latents.isfinite().all()


def test_maps_are_of_the_conditional_pass_and_any_shape(tiny: Model) -> None:
    result = _run(tiny, height=96, width=160, maps=True, seeds=[0, 1], batch_size=1)
    assert result.maps["frog"].values.shape == (2, 6, 3, 5)
    torch.testing.assert_close(result.maps.values.sum(dim=-1), torch.ones(2, 6, 3, 5, dtype=torch.float64))
    heat = result.maps["frog"].heat_map(image=1)
    assert (heat.min(), heat.max()) == (0, 1)
    unguided = _run(tiny, height=96, width=160, maps=True, guidance_scale=1.0)
    torch.testing.assert_close(unguided.maps.values[0, 0], result.maps.values[0, 0], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="not in the prompt"):
        result.maps["dog"]
    with pytest.raises(ValueError, match="maps=True"):
        _run(tiny, steps=1).maps  # noqa: B018


def test_guidance_passes_are_made_only_where_the_latent_can_change(tiny: Model) -> None:
    passes: list[int] = []
    with_hook = tiny.network.conv_in.register_forward_hook(lambda _, __, out: passes.append(len(out)))
    _run(tiny, method=AttendAndExcite(replace(GENTLE.recipe, thresholds=())))  # type: ignore[type-var]
    with_hook.remove()
    # Six passes of two halves, and before each of the first three one of the conditional half.
    assert passes == [1, 2] * 3 + [2] * 3


def test_a_shift_is_as_large_with_every_scheduler(tiny: Model) -> None:
    plain = tiny.pipeline.scheduler
    shifts = []
    for kind in (DDIMScheduler, EulerDiscreteScheduler):
        try:
            tiny.pipeline.scheduler = kind.from_config(plain.config)
            drawn = tiny.generate(CAT_AND_FROG, method=AttendAndExcite("bare"), steps=4, progress=False)
        finally:
            tiny.pipeline.scheduler = plain
        shifts.append([update.shift for step in drawn.trace[0].steps for update in step.updates])
    assert shifts[0] == pytest.approx(shifts[1], rel=1e-3)
    assert min(shifts[0]) > 0


def test_the_objective_is_wide_in_a_callers_autocast(tiny_folder: Path) -> None:
    model = load(tiny_folder, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        drawn = model.generate(CAT_AND_FROG, steps=2, maps=True, progress=False)
    assert drawn.maps.values.dtype == torch.float32
    total = drawn.maps.values.sum(dim=-1)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    losses = [update.loss for step in drawn.trace[0].steps for update in step.updates]
    assert any(loss != float(torch.tensor(loss).bfloat16()) for loss in losses)


def test_numbers_of_numpy_are_seeds(tiny: Model) -> None:
    drawn = tiny.generate(CAT_AND_FROG, seeds=np.arange(2), steps=1, decode=False, progress=False)
    assert drawn.seeds == [0, 1]
    assert tiny.generate(CAT_AND_FROG, seeds=np.int64(1), steps=1, decode=False, progress=False).seeds == [1]


@pytest.mark.parametrize("compiled", ["whole", "blocks"])
def test_maps_of_a_compiled_unet_are_those_of_the_plain_one(tiny_folder: Path, compiled: str) -> None:
    model = load(tiny_folder, device="cpu")
    options: dict[str, Any] = {"steps": 2, "maps": True, "decode": False, "progress": False}
    expected = model.generate(CAT_AND_FROG, **options)
    if compiled == "whole":
        model.pipeline.unet = torch.compile(model.network, backend="eager")
    else:
        model.network.compile_repeated_blocks(backend="eager")
    model.generate(CAT_AND_FROG, method=StableDiffusion(), steps=2, decode=False, progress=False)
    found = model.generate(CAT_AND_FROG, **options)
    assert torch.allclose(found.maps.values, expected.maps.values, atol=1e-5)
    assert torch.allclose(found.latents, expected.latents, atol=1e-4)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was(
    tiny: Model, same_model: Callable[[Model], Callable[[], None]], error: type[BaseException] | None
) -> None:
    tiny.network.train()
    check = same_model(tiny)

    def interrupt(event: StepEvent) -> None:
        assert not any(parameter.requires_grad for parameter in tiny.network.parameters())
        if event.index == 1 and error is not None:
            raise error

    if error is None:
        _run(tiny, callback=interrupt)
    else:
        with pytest.raises(error):
            _run(tiny, callback=interrupt)
    check()
    tiny.network.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_latents_wide(tiny_folder: Path, dtype: torch.dtype) -> None:
    half, full = (
        _run(load(tiny_folder, device="cpu", dtype=precision), steps=2)
        for precision in (dtype, torch.float32)
    )
    assert half.latents.dtype == torch.float32
    assert (half.latents - full.latents).norm() / full.latents.norm() < 0.05


def test_stable_diffusion_2_normalises_over_the_prompt_only(tiny: Model) -> None:
    assert not tiny.family.streams()[0].prompt_tokens_only
    over_prompt = replace(GENTLE.recipe, prompt_tokens_only=True)  # type: ignore[type-var]
    narrow = _run(tiny, method=AttendAndExcite(over_prompt)).trace[0].steps[0].updates[0].attention
    wide = _run(tiny).trace[0].steps[0].updates[0].attention
    assert all(narrow[word] > wide[word] for word in wide)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "very quickly"}, "no noun found in 'very quickly'"),
        ({"subjects": ["dog"]}, "'dog' is not in the prompt"),
        ({"subjects": []}, "Attend-and-Excite needs a subject: name at least one"),
        ({"width": 100}, "width is 100: it must be a multiple of 8 pixels"),
        ({"seeds": []}, "seeds is"),
        ({"seeds": -1}, "none negative"),
        ({"steps": 0}, "steps is 0: it must be a whole number, 1 or more"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"method": AttendAndExcite}, "give one that is made"),
        ({"prompt": "a cat and a [-frog]"}, "is no word"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": "7.5"}, "guidance_scale is '7.5': it must be a number, 0 or more"),
        ({"steps": "4"}, "steps is '4': it must be a whole number, 1 or more"),
        ({"seeds": 1.5}, "seeds is 1.5: it must be one or more whole numbers"),
        ({"seeds": "12"}, "seeds is '12'"),
        ({"seeds": [0, None]}, "seeds is"),
        ({"seeds": 2**70}, "none negative or above 18446744073709551615"),
        ({"prompt": None}, "prompt is None: it must be a text, or several"),
        ({"prompt": ["a cat", None]}, "it must be a text, or several"),
        ({"prompt": b"a cat"}, "it must be a text, or several"),
        ({"prompt": 5}, "prompt is 5"),
        ({"method": object()}, "give one that is made, as AttendAndExcite"),
        ({"method": "composable"}, "the method is 'composable': give one that is made"),
        ({"batch_size": "4"}, "batch_size is '4'"),
        ({"height": "128"}, "height is '128'"),
        ({"width": 32, "height": 32}, "make it 64 pixels wide and high"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"height": 0}, "height is 0"),
        ({"negative_prompt": ["a dog"]}, "one text for all prompts"),
        ({"subjects": 5}, "with several prompts a list of such lists"),
        ({"prompt": ["a cat", "a dog"], "subjects": [2, 5]}, "with several prompts a list of such lists"),
        ({"prompt": ["a cat", "a dog"], "subjects": [["cat"]]}, "2 prompts but subjects for 1"),
        ({"prompt": ["a cat", "a dog"], "subjects": []}, "2 prompts but subjects for 0"),
        ({"guidance_scale": "3"}, "guidance_scale is '3'"),
        (
            {"prompt": ["a cat", "a dog"], "subjects": ["cat", "dog"]},
            "with several prompts a list of such lists",
        ),
        ({"prompt": ["a cat", "a dog"], "subjects": {"cat": 1}}, "with several prompts a list of such lists"),
        ({"subjects": {}}, "Attend-and-Excite needs a subject: name at least one"),
    ],
)
def test_bad_input_is_refused_at_the_door(tiny: Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _run(tiny, **options)


def test_a_model_of_earlier_libraries_is_read(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    model = load(folder, device="cpu")
    assert isinstance(model.pipeline.feature_extractor, CLIPImageProcessor)
    drawn = model.generate(CAT_AND_FROG, method=StableDiffusion(), seeds=[0, 1], steps=1, progress=False)
    assert drawn.only(-1).images == drawn.images[1:]


@pytest.mark.parametrize("recipe", [{"step_size": 5.0}, 5, ["official"]])
def test_a_recipe_of_another_kind_is_refused(recipe: Any) -> None:
    with pytest.raises(ValueError, match=r"the recipe is of type .*: give the name of one, or make one"):
        AttendAndExcite(recipe)


def test_a_mapping_names_targets_for_each_prompt(tiny: Model) -> None:
    drawn = _run(tiny, ["a cat", "a dog"], subjects=[{"cat": 0.3}, None], steps=1)
    assert [[group.target for group in prompt.groups] for prompt in drawn.prompts] == [[0.3], [1.0]]


def test_unknown_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model 'stable-confusion'"):
        load("stable-confusion")
    with pytest.raises(ValueError, match="not a model in diffusers layout"):
        load(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"in_channels": 9},
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 8,
        },
    ],
    ids=["inpainting", "SDXL"],
)
def test_a_unet_that_needs_more_than_text_is_refused(tiny: Model, changed: dict[str, Any]) -> None:
    unet = UNet2DConditionModel.from_config(dict(tiny.network.config) | changed)
    parts = tiny.pipeline.components | {"unet": unet}
    with pytest.raises(ValueError, match="needs more than latents and a text"):
        load(StableDiffusionPipeline(**parts, requires_safety_checker=False))


def test_a_pipeline_for_another_task_is_refused(tiny: Model) -> None:
    """Its picture to start from, or its control, would be dropped without a word."""
    pipeline = StableDiffusionImg2ImgPipeline(**tiny.pipeline.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r"StableDiffusionImg2ImgPipeline is not served: .* from_pipe"):
        load(pipeline)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "text_encoder",
            "lacking",
            r"'text_encoder' .* CLIPTextModel: the file lacks 2 of them \(.*layer_norm1",
        ),
        ("unet", "lacking", r"'unet' .* UNet2DConditionModel: the file lacks 2 of them \("),
        ("vae", "more", r"'vae' .* AutoencoderKL: the file has unknown 1 of them \(stray\)"),
    ],
)
def test_weights_that_are_not_there_are_named(
    tiny_folder: Path, tmp_path: Path, part: str, change: str, message: str
) -> None:
    """Libraries only warn, and the picture is garbage."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    if change == "more":
        weights["stray"] = torch.zeros(1)
    else:
        for name in [name for name in weights if "layer_norm1" in name or "conv_in" in name][:2]:
            del weights[name]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load(folder, device="cpu")


def test_a_folder_that_is_not_whole_is_told_before_its_weights_are_read(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"not whole: 'tokenizer' has no vocabulary \(tokenizer.json"):
        load(folder, device="cpu")
    (folder / "tokenizer").rmdir()
    with pytest.raises(ValueError, match="not whole: it has no folder 'tokenizer'"):
        load(folder, device="cpu")


def test_what_is_no_model_is_told(tiny: Model) -> None:
    with pytest.raises(ValueError, match="this is a UNet2DConditionModel: pass the pipeline"):
        load(tiny.network)  # type: ignore[arg-type]
    with torch.inference_mode():
        unet = UNet2DConditionModel.from_config(tiny.network.config)
    parts = tiny.pipeline.components | {"unet": unet}
    with pytest.raises(ValueError, match=r"made within torch.inference_mode"):
        load(StableDiffusionPipeline(**parts, requires_safety_checker=False))


def test_offloaded_parameters_ask_for_gradients_as_before(tiny_folder: Path) -> None:
    model = load(tiny_folder, device="cpu")
    model.network.requires_grad_(True)
    cpu_offload(model.network, execution_device=torch.device("cpu"))
    model.generate(CAT_AND_FROG, steps=1, decode=False, progress=False)
    assert all(parameter.requires_grad for parameter in model.network.parameters())


def test_a_word_that_the_model_has_never_read_is_named(stickers: Model) -> None:
    for method in (StableDiffusion(), AttendAndExcite()):
        with pytest.warns(UserWarning, match="stickers has never read the word 'dragon'"):
            stickers.generate("a cat and a dragon", method=method, steps=1, progress=False)


@pytest.mark.parametrize("method", [StableDiffusion(), GENTLE])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_broken_weight_is_an_error_and_no_black_picture(tiny_folder: Path, method: Any, part: str) -> None:
    model = load(tiny_folder, device="cpu")
    broken = {"unet": model.network.conv_out, "vae": model.pipeline.vae.decoder.conv_out}[part]
    with torch.no_grad():
        broken.bias[0] = torch.nan
    where = {
        "unet": "the model's output became NaN or infinite at step 0 of 3",
        "vae": "the pixels became NaN",
    }
    with pytest.raises(ValueError, match=where[part]):
        model.generate(CAT_AND_FROG, method=method, steps=3, progress=False)


def test_the_step_and_the_image_that_broke_are_named(tiny: Model) -> None:
    class Breaks:
        name, title, uses_subjects, attends_to_prompt = "breaks", "Breaks", False, True

        @contextmanager
        def attach(self, run: Run) -> Iterator[Denoise]:
            def denoise(latents: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
                output = latents.clone()
                if step.index == 2:
                    latents = latents.clone()
                    latents[1] = torch.inf
                return latents, output

            yield denoise

    message = r"the latents given to the model became NaN or infinite at step 2 of 4, .*image 1 of the batch"
    with pytest.raises(ValueError, match=message):
        tiny.generate(CAT_AND_FROG, method=Breaks(), seeds=range(3), steps=4, progress=False)


def test_threads_that_share_a_model_take_turns(tiny: Model) -> None:
    prompts = [CAT_AND_FROG, "a lion with a crown and a clock", "a big red dog", "a cat and a frog or two"]
    alone = [_run(tiny, prompt, steps=3).latents for prompt in prompts]
    before = tiny.network.conv_in.weight.requires_grad
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: _run(tiny, prompt, steps=3).latents, prompts * 2))
    for expected, found in zip(alone * 2, together, strict=True):
        assert torch.equal(expected, found)
    assert tiny.network.conv_in.weight.requires_grad == before


def test_what_the_context_cuts_of_either_prompt_is_said(stickers: Model) -> None:
    long = "a red cat and a blue dog and a pink frog and a green bird and a cow"
    options: dict[str, Any] = {"method": StableDiffusion(), "steps": 1, "decode": False, "progress": False}
    with pytest.warns(
        UserWarning, match="the prompt is longer than the model's context of 16 tokens: .* is cut"
    ):
        stickers.generate(long, **options)
    with pytest.warns(UserWarning, match="the negative prompt is longer than .* is cut") as told:
        stickers.generate("a cat", negative_prompt=long, **options)
    assert [each.category for each in told].count(UserWarning) == 1
    with pytest.warns(UserWarning, match=r"in the negative prompt, '\(blurry:1\.4\)': other programs"):
        stickers.generate("a cat", negative_prompt="(blurry:1.4)", **options)

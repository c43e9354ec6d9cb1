"""Memory savers that go with nursing give the same latents; what doesn't is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks.faster_cache import FasterCacheConfig
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from torch import Tensor, nn

from attend_excite import AttendAndExcite, load
from attend_excite.callback import nursing_callback
from attend_excite.guidance.schedule import Recipe
from attend_excite.models.hindrances import refuse_hindrances
from tests.families import FAMILIES, ready

CPU = torch.device("cpu")


def _drawn(pipeline: Any) -> Tensor:
    method = AttendAndExcite(Recipe.from_dict({"base": "official", "thresholds": []}))
    drawn = load(pipeline).generate(
        "a cat and a frog", method=method, seeds=[0, 1], steps=4, decode=False, progress=False
    )
    assert all(trace.steps[0].updates[0].shift > 0 for trace in drawn.trace)
    return drawn.latents


def _sequential(pipeline: Any) -> None:
    accelerate.cpu_offload(pipeline.transformer, execution_device=CPU)


SAVERS: dict[str, Callable[[Any], Any]] = {
    "checkpointing": lambda pipeline: pipeline.transformer.enable_gradient_checkpointing(),
    "model offload": lambda pipeline: pipeline.enable_model_cpu_offload(device="cpu"),
    "sequential offload": _sequential,
    "both": lambda pipeline: (_sequential(pipeline), pipeline.transformer.enable_gradient_checkpointing()),
}


@pytest.mark.parametrize("name", ["flux", "stable-diffusion-3"])
def test_what_saves_memory_changes_nothing(name: str) -> None:
    expected = _drawn(ready(FAMILIES[name]()))
    for saver, apply in SAVERS.items():
        pipeline = ready(FAMILIES[name]())
        apply(pipeline)
        torch.testing.assert_close(_drawn(pipeline), expected, rtol=0, atol=1e-6, msg=saver)


@pytest.mark.parametrize("name", ["flux", "stable-diffusion-3"])
def test_layerwise_casting_is_as_weights_of_fewer_bits(name: str) -> None:
    cast, rounded = ready(FAMILIES[name]()), ready(FAMILIES[name]())
    cast.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    for layer, theirs in zip(rounded.transformer.modules(), cast.transformer.modules(), strict=True):
        if isinstance(layer, nn.Linear) and theirs.weight.dtype == torch.bfloat16:
            layer.to(torch.bfloat16).to(torch.float32)
    torch.testing.assert_close(_drawn(cast), _drawn(rounded), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (FirstBlockCacheConfig(), "first block cache"),
        (FasterCacheConfig(current_timestep_callback=lambda: 0), "faster cache"),
        (
            PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 0),
            "pyramid attention broadcast",
        ),
        (TaylorSeerCacheConfig(), "taylorseer cache"),
        (MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4), "mag cache"),
    ],
)
def test_a_cache_is_refused_also_after_loading(config: Any, named: str) -> None:
    pipeline = ready(FAMILIES["flux"]())
    model = load(pipeline)
    pipeline.transformer.enable_cache(config)
    for work in (lambda: load(pipeline), lambda: model.generate("a cat and a frog", steps=4)):
        with pytest.raises(ValueError, match=rf"{named} .*disable_cache\(\)"):
            work()
    pipeline.transformer.disable_cache()
    refuse_hindrances(pipeline.transformer)


def test_group_offloading_and_casting_of_convolutions_are_refused() -> None:
    pipeline = ready(FAMILIES["flux"]())
    callback = nursing_callback(pipeline, "a cat and a frog")
    pipeline.transformer.enable_group_offload(CPU, offload_device=CPU, offload_type="leaf_level")
    with pytest.raises(ValueError, match=re.escape("use enable_model_cpu_offload()")):
        refuse_hindrances(pipeline.transformer)
    with pytest.raises(ValueError, match=re.escape("use enable_model_cpu_offload()")):
        pipeline("a cat and a frog", num_inference_steps=2, callback_on_step_end=callback)
    with_convolution = ready(FAMILIES["stable-diffusion-3"]()).vae
    with_convolution.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="layerwise casting stores the weights of its Conv2d"):
        refuse_hindrances(with_convolution)


def test_casting_around_a_lora_is_not_in_the_way() -> None:
    peft = pytest.importorskip("peft")
    transformer = ready(FAMILIES["flux"]()).transformer
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    refuse_hindrances(transformer)


@pytest.mark.parametrize(
    ("name", "left_out"), [("flux", ("text_encoder_2", "tokenizer_2")), ("pixart", ("tokenizer",))]
)
def test_a_pipeline_without_what_reads_the_text_is_refused(name: str, left_out: Sequence[str]) -> None:
    pipeline = ready(FAMILIES[name]())
    for part in left_out:
        setattr(pipeline, part, None)
    with pytest.raises(ValueError, match=rf"Pipeline has no {', '.join(left_out)}: load it whole"):
        load(pipeline)


def test_a_network_spread_over_devices_is_refused() -> None:
    transformer = ready(FAMILIES["flux"]()).transformer
    transformer.transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(ValueError, match="spread over several devices"):
        refuse_hindrances(transformer)


class _Rounding(nn.Linear):
    """Rounds its input, as those that work in whole numbers do: no gradient passes."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward((input * 127).round() / 127)


@pytest.mark.parametrize("passes", [True, False])
def test_a_quantised_network_is_refused_where_no_gradient_passes(passes: bool) -> None:
    transformer: Any = ready(FAMILIES["flux"]()).transformer
    config = SimpleNamespace(quant_method="eight-bits")
    transformer.hf_quantizer = SimpleNamespace(quantization_config=config)
    if passes:
        refuse_hindrances(transformer)
        return
    transformer.proj_out = _Rounding(transformer.proj_out.in_features, transformer.proj_out.out_features)
    with pytest.raises(ValueError, match=r"quantised by eight-bits, .* through its _Rounding"):
        refuse_hindrances(transformer)

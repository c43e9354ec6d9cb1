"""The nodes in a checkout of ComfyUI, on tiny random models: `pytest comfyui --host PATH`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("host")

TEXT = "a [lion] and a (red:1.2) [monkey]"
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 16,
    "num_heads": 2,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "dtype": torch.float32,
}
XL = UNET | {"use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816}
MMDIT = {
    "in_channels": 16,
    "input_size": None,
    "depth": 3,
    "adm_in_channels": 2048,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 16, "out_features": 192},
    },
    "pos_embed_max_size": 16,
    "num_patches": 256,
    "dtype": torch.float32,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 16,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 3,
    "depth_single_blocks": 1,
    "axes_dim": [4, 4, 8],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "dtype": torch.float32,
}
SD2 = UNET | {"use_linear_in_transformer": True, "num_heads": -1, "num_head_channels": 16}
KINDS = {"SD15": UNET, "SD20": SD2, "SDXL": XL, "SD3": MMDIT, "FluxSchnell": FLUX}


class Drawn(SimpleNamespace):
    """A tiny model of the host, its prompts, and how it draws."""

    def __call__(
        self, model: Any, noise: Tensor | None = None, sampler: str = "euler", **options: Any
    ) -> Tensor:
        import comfy.sample

        noise = self.noise if noise is None else noise
        with torch.inference_mode():
            return comfy.sample.sample(
                model,
                noise.clone(),
                4,
                3.0,
                sampler,
                "simple",
                self.positive,
                self.negative,
                torch.zeros_like(noise),
                disable_pbar=True,
                seed=5,
                **options,
            )

    def nursed(self, **options: Any) -> Any:
        from comfyui.nodes import AttendExcite

        told = {"recipe": "no-refinement", "strength": 1.0, "last_step": 0} | options
        with torch.inference_mode():
            return AttendExcite.execute(self.model, positive=self.positive, **told).args[0]

    def weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        named = {**dict(self.model.model.named_parameters()), **dict(self.model.model.named_buffers())}
        return {name: (each, each.clone()) for name, each in named.items()}


@pytest.fixture(scope="module")
def tiny() -> Callable[[str], Drawn]:
    made: dict[str, Drawn] = {}

    def make(kind: str) -> Drawn:
        if kind not in made:
            with torch.inference_mode():
                made[kind] = _drawn(kind)
        return made[kind]

    return make


def _drawn(kind: str) -> Drawn:
    import comfy.model_patcher
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models
    import comfy.text_encoders.flux
    import comfy.text_encoders.sd2_clip
    import comfy.text_encoders.sd3_clip

    from comfyui.nodes import AttendExciteSubjects

    config = getattr(comfy.supported_models, kind)(dict(KINDS[kind]))
    config.unet_config = dict(KINDS[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = config.get_model({}, "", device="cpu")
        for weights in [*network.diffusion_model.parameters(), *network.diffusion_model.buffers()]:
            if weights.is_floating_point():
                weights.normal_(0, 1.5 * max(weights[0].numel(), 1) ** -0.5 if weights.ndim > 1 else 0.3)
        patcher = comfy.model_patcher.ModelPatcher(network, torch.device("cpu"), torch.device("cpu"))
    tokenizers = {
        "SD15": comfy.sd1_clip.SD1Tokenizer,
        "SD20": comfy.text_encoders.sd2_clip.SD2Tokenizer,
        "SDXL": comfy.sdxl_clip.SDXLTokenizer,
        "SD3": comfy.text_encoders.sd3_clip.SD3Tokenizer,
        "FluxSchnell": comfy.text_encoders.flux.FluxTokenizer,
    }
    clip = _Clip(kind, tokenizers[kind]())
    positive = AttendExciteSubjects.execute(clip, TEXT, "").args[0]
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    channels = KINDS[kind]["in_channels"]
    noise = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(3))
    return Drawn(model=patcher, positive=positive, negative=negative, noise=noise, clip=clip)


class _Clip:
    """The host's tokenizers, and a random vector for each token."""

    def __init__(self, kind: str, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        encoders = ["clip_h"] if kind == "SD20" else ["clip_l", "clip_g", "t5xxl"]
        self.cond_stage_model = SimpleNamespace(**dict.fromkeys(encoders, True))
        self._keys = {
            "SD15": ["l"],
            "SD20": ["h"],
            "SDXL": ["l"],
            "SD3": ["l", "t5xxl"],
            "FluxSchnell": ["t5xxl"],
        }[kind]
        self._pooled = {"SDXL": 1280, "SD3": 2048}.get(kind, 768)

    def tokenize(self, text: str, return_word_ids: bool = False) -> Any:
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def encode_from_tokens_scheduled(self, tokens: Any) -> list:
        states = [
            weight * torch.randn(16, generator=torch.Generator().manual_seed(int(token)))
            for key in self._keys
            for chunk in tokens[key]
            for token, weight, *_ in chunk
        ]
        return [[torch.stack(states)[None], {"pooled_output": torch.ones(1, self._pooled)}]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_nursed_and_left_as_it_was(kind: str, tiny: Callable[[str], Drawn]) -> None:
    draw = tiny(kind)
    before, plain = draw.weights(), draw(draw.model)
    assert all(each.is_inference() for each, _ in before.values())
    under = draw.nursed()
    first = draw(under)
    assert first.isfinite().all()
    assert not torch.allclose(first, plain, atol=1e-3)
    assert torch.equal(draw(under), first)
    assert torch.equal(draw(draw.nursed(strength=0.0)), plain)
    assert torch.equal(draw(draw.model), plain)
    for name, (each, values) in draw.weights().items():
        assert each is before[name][0]
        assert torch.equal(values, before[name][1])
    maps = under.attachments["attend_excite"].maps
    assert list(maps) == ["lion", "monkey"]
    assert maps.values.shape[:4] == (2, 4, 4, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shift_goes_down_the_loss_as_a_finite_difference_has_it(
    kind: str, tiny: Callable[[str], Drawn]
) -> None:
    """Blocks of the host change in place what the way back needs."""
    draw = tiny(kind)
    shift, _ = _first(draw, draw.noise)
    length = shift.flatten(1).norm(dim=1)
    # The shift is -size / scale^2 times the gradient.
    expected = -length * _vp(draw) ** 2 / (_STRENGTH * _step_size(kind))
    # So far that the loss changes by more than rounding, and by little.
    little = 2e-5 / expected.abs()
    move = (little / length / _sigma(draw)).view(-1, 1, 1, 1) * shift
    losses = [_first(draw, draw.noise + sign * move)[1] for sign in (1, -1)]
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * little), expected, rtol=0.05, atol=0)


# So little that no recipe's bound on a shift is met.
_STRENGTH = 0.02


def _step_size(kind: str) -> float:
    from attend_excite.guidance.schedule import Recipe
    from attend_excite.models.families.base import family_data
    from comfyui.architectures import _KNOWN

    recipe = Recipe.named("no-refinement", Recipe.from_dict(family_data()[_KNOWN[kind].family].recipe))
    return recipe.step_size


def _sigma(draw: Drawn) -> float:
    import comfy.samplers

    sampling = draw.model.get_model_object("model_sampling")
    return float(comfy.samplers.calculate_sigmas(sampling, "simple", 4)[0])


def _vp(draw: Drawn) -> float:
    from comfyui.nursing import vp_scale

    return vp_scale(draw.model.get_model_object("model_sampling"), torch.tensor([_sigma(draw)]))


def _first(draw: Drawn, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What the first step moves latents by, and the loss there before."""
    import comfy.sample
    import comfy.samplers

    seen = []

    def sample(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any) -> Tensor:
        before = x.clone()
        model(x, sigmas[0] * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": 0, "denoised": x})
        seen.append(x - before)
        return x

    under = draw.nursed(last_step=1, strength=_STRENGTH)
    sigmas = torch.tensor([_sigma(draw), 0.0])
    with torch.inference_mode():
        comfy.sample.sample_custom(
            under,
            noise.clone(),
            3.0,
            comfy.samplers.KSAMPLER(sample),
            sigmas,
            draw.positive,
            draw.negative,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=5,
        )
    return seen[-1].clone(), under.attachments["attend_excite"].visits[0][0].loss


def test_samplers_begin_where_the_host_has_them_begin(tiny: Callable[[str], Drawn]) -> None:
    """Every sampler of the host's is nursed, or refused by name."""
    import comfy.samplers

    from comfyui.steps import step_calls

    draw = tiny("SD15")
    guider = SimpleNamespace(model_patcher=draw.model, inner_model=draw.model.model)
    model = SimpleNamespace(inner_model=guider)
    sampling = draw.model.get_model_object("model_sampling")
    refused, twice = set(), set()
    with torch.inference_mode():
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 6)
        for name in comfy.samplers.SAMPLER_NAMES:
            sampler = comfy.samplers.sampler_object(name)
            told = {"model_options": {}, "seed": 1, "denoise_mask": None}
            try:
                calls = step_calls(
                    sampler.sampler_function,
                    model,
                    sigmas,
                    lambda steps: range(steps // 2),
                    told,
                    sampler.extra_options,
                    name,
                )
            except ValueError as error:
                refused |= {name} if f"under the sampler {name}," in str(error) else {str(error)}
                continue
            if calls != tuple(range(6)):
                twice.add(name)
    assert refused == {"dpm_adaptive", "sa_solver", "sa_solver_pece", "uni_pc", "uni_pc_bh2"}
    assert {"heun", "heunpp2", "dpm_2", "dpmpp_sde", "dpmpp_2s_ancestral", "seeds_3"} <= twice


def test_inside_of_a_mask_alone(tiny: Callable[[str], Drawn]) -> None:
    draw = tiny("SD15")
    mask = torch.zeros(1, 16, 16)
    mask[..., 8:] = 1
    plain, under = (draw(each, noise_mask=mask) for each in (draw.model, draw.nursed()))
    assert not torch.allclose(under[..., 8:], plain[..., 8:], atol=1e-3)
    assert torch.equal(under[..., :8], plain[..., :8])


def test_an_interrupt_leaves_the_model_clean(tiny: Callable[[str], Drawn]) -> None:
    import comfy.model_management as management

    draw = tiny("SD15")
    before, under = draw.weights(), draw.nursed()
    first = draw(under)
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        draw(under)
    management.interrupt_current_processing(False)
    assert all(each is before[name][0] for name, (each, _) in draw.weights().items())
    assert torch.equal(draw(under), first)


def test_a_lora_below_the_node_is_nursed_too(tiny: Callable[[str], Drawn]) -> None:
    draw = tiny("SD15")
    name = next(name for name, each in draw.model.model.named_parameters() if "attn2.to_k" in name)
    with torch.inference_mode():
        width = dict(draw.model.model.named_parameters())[name].shape
        other = draw.nursed().clone()
        other.add_patches({name: ("diff", (torch.ones(width) * 0.3,))})
        bare = draw.model.clone()
        bare.add_patches({name: ("diff", (torch.ones(width) * 0.3,))})
    found, plain = draw(other), draw(bare)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert not torch.allclose(plain, draw(draw.model), atol=1e-3)


def test_with_a_controlnet(tiny: Callable[[str], Drawn]) -> None:
    from comfy.controlnet import ControlBase

    class Control(ControlBase):
        """Its weights are born in inference mode, too."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(4, 64, 4, 4)

        def get_control(self, x_noisy: Tensor, *_: Any, **__: Any) -> dict[str, list[Tensor]]:
            return {"input": [], "middle": [self.layer(x_noisy)], "output": []}

        def inference_memory_requirements(self, dtype: Any) -> int:
            return 0

    draw = tiny("SD15")
    with torch.inference_mode():
        told = {"control": Control(), "control_apply_to_uncond": True}
        positive = [[states, {**told, **other}] for states, other in draw.positive]
    controlled = Drawn(**{**vars(draw), "positive": positive})
    plain = controlled(draw.model)
    assert not torch.allclose(plain, draw(draw.model), atol=1e-3)
    assert not torch.allclose(controlled(draw.nursed()), plain, atol=1e-3)


def test_other_models_are_refused_by_the_hosts_name(tiny: Callable[[str], Drawn]) -> None:
    from comfyui.architectures import architecture_of

    draw = tiny("SD15")
    other = SimpleNamespace(model=SimpleNamespace(model_config=type("Chroma", (), {})()))
    with pytest.raises(ValueError, match="Chroma"):
        architecture_of(other)
    assert architecture_of(draw.model).family == "stable-diffusion"


def test_the_contract_has_the_hosts_names_and_arguments(host: Path) -> None:
    """What stands for the host in the other tests, against the host."""
    import importlib.util

    folder = Path(__file__).parent / "contract"
    for file in sorted(folder.rglob("*.py")):
        name = ".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        spec = importlib.util.spec_from_file_location(f"contract_of_{name.replace('.', '_')}", file)
        assert spec is not None
        assert spec.loader is not None
        small = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(small)
        real = importlib.import_module(name)
        for public, value in vars(small).items():
            if public.startswith("_") or getattr(value, "__module__", None) != small.__name__:
                continue
            theirs = getattr(real, public)
            if inspect.isfunction(value):
                ours = inspect.signature(value).parameters
                known = inspect.signature(inspect.unwrap(theirs)).parameters
                assert ours.keys() - {"q", "k", "v"} <= known.keys(), (name, public)
            elif public in ("WrappersMP",):
                for attribute, content in vars(value).items():
                    if not attribute.startswith("_"):
                        assert getattr(theirs, attribute) == content


def test_the_host_reads_the_package(host: Path) -> None:
    from comfy_config.config_parser import extract_node_configuration

    config = extract_node_configuration(str(Path(__file__).parents[1]))
    assert config.project.name == "attend-excite-nodes"
    assert config.tool_comfy.display_name == "Attend-and-Excite"
    # Named in __init__.py; twice, and the page would load it twice.
    assert not config.tool_comfy.web

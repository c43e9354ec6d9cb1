"""A host of milliseconds: model, conditionings and samplers behind the names that ComfyUI has for them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrapperExecutor, copy_nested_dicts
from comfy.sd1_clip import escape_important, token_weights, unescape_important
from torch import Tensor, nn
from torch.nn import functional as F

from tests import families

SIGMAS = torch.tensor([14.0, 6.0, 2.5, 1.0, 0.3, 0.0])
CHANNELS, HEADS, WIDTH = 8, 2, 6


class SD15:
    """The host's name for Stable Diffusion 1.x."""


class Network(nn.Module):
    """A UNet of one transformer block, at a quarter of the latent's size."""

    def __init__(self) -> None:
        super().__init__()
        self.input_blocks, self.output_blocks = nn.ModuleList([nn.Conv2d(4, CHANNELS, 4, 4)]), nn.ModuleList()
        self.layers = nn.ModuleDict(
            {
                f"{kind}_{part}": nn.Linear(WIDTH if kind == "attn2" and part != "q" else CHANNELS, CHANNELS)
                for kind in ("attn1", "attn2")
                for part in "qkv"
            }
        )
        self.out = nn.Conv2d(CHANNELS, 4, 1)
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, latents: Tensor, context: Tensor, told: dict[str, Any]) -> Tensor:
        hidden = self.input_blocks[0](latents)
        tokens = hidden.flatten(2).transpose(1, 2)
        told = {**told, "block": ("input", 0), "block_index": 0, "n_heads": HEADS, "attn_precision": None}
        # Changed in place, as some of the host's blocks do.
        tokens = torch.tanh(tokens)
        tokens += self.attend("attn1", tokens, tokens, told)
        tokens += self.attend("attn2", tokens, context, told)
        hidden = self.scale * tokens.transpose(1, 2).unflatten(2, hidden.shape[-2:])
        return self.out(F.interpolate(hidden, latents.shape[-2:]))

    def attend(self, kind: str, rows: Tensor, columns: Tensor, told: dict[str, Any]) -> Tensor:
        parts = [self.layers[f"{kind}_{p}"](rows if p == "q" else columns) for p in "qkv"]
        replaced = told.get("patches_replace", {}).get(kind, {}).get(told["block"])
        if replaced is not None:
            return replaced(*parts, told)
        return optimized_attention(*parts, HEADS, attn_precision=None, transformer_options=told)


class Sampling:
    """The noise of Stable Diffusion: x = x0 + sigma noise."""

    sigma_data = 1.0

    def noise_scaling(
        self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False
    ) -> Tensor:
        return noise * sigma.view(-1, 1, 1, 1)[:1] + latent_image


class BaseModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = Network()
        self.model_config = SD15()
        self.concat_keys = ()

    def apply_model(self, x: Tensor, sigma: Tensor, context: Tensor, told: dict[str, Any]) -> Tensor:
        level = sigma.view(-1, 1, 1, 1)
        scaled = x / (level**2 + 1) ** 0.5
        return x - level * self.diffusion_model(scaled, context, told)


class ModelPatcher:
    """The host's MODEL."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.attachments: dict[str, Any] = {}
        self.wrappers: dict[str, Any] = {}

    def clone(self) -> ModelPatcher:
        own = ModelPatcher(self.model)
        own.attachments, own.wrappers = dict(self.attachments), copy_nested_dicts(self.wrappers)
        return own

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def get_model_object(self, name: str) -> Any:
        return Sampling()


class Guider:
    """Classifier-free guidance over the host's conditionings."""

    def __init__(self, model: ModelPatcher, positive: list, negative: list) -> None:
        self.model_patcher, self.inner_model = model, model.model
        self.conds = {"positive": _converted(positive), "negative": _converted(negative)}

    def sample(
        self, noise: Tensor, sampler: Any, sigmas: Tensor = SIGMAS, mask: Tensor | None = None
    ) -> Tensor:
        wrappers = [
            each for of in self.model_patcher.wrappers.get("outer_sample", {}).values() for each in of
        ]
        executor = WrapperExecutor(self._sample, self, wrappers)
        return executor.execute(noise, torch.zeros_like(noise), sampler, sigmas, mask)

    def _sample(self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, mask: Any) -> Tensor:
        masked = Masked(self, noise, latent_image)
        extra = {"model_options": {"transformer_options": {}}, "seed": 1, "denoise_mask": mask}
        start = noise * float(sigmas[0])
        return sampler.sampler_function(
            masked, start, sigmas, extra_args=extra, callback=lambda told: None, disable=True
        )

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict[str, Any]) -> Tensor:
        kinds = model_options["transformer_options"].get("wrappers", {}).get("calc_cond_batch", {})
        executor = WrapperExecutor(_calculate, None, [each for of in kinds.values() for each in of])
        conds = [self.conds["positive"], self.conds["negative"]]
        positive, negative = executor.execute(self.inner_model, conds, x, sigma, model_options)
        return negative + 7.5 * (positive - negative)


class Masked:
    """Where there is a mask, the sampler's latents are mixed with the picture's: a new tensor."""

    def __init__(self, guider: Guider, noise: Tensor, picture: Tensor) -> None:
        self.inner_model, self.noise, self.picture = guider, noise, picture

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        model_options: dict[str, Any],
        seed: int | None = None,
        denoise_mask: Tensor | None = None,
    ) -> Tensor:
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options)
        noisy = Sampling().noise_scaling(sigma, self.noise, self.picture)
        x = x * denoise_mask + noisy * (1 - denoise_mask)
        out = self.inner_model(x, sigma, model_options)
        return out * denoise_mask + self.picture * (1 - denoise_mask)


def _calculate(
    model: BaseModel, conds: list, x: Tensor, sigma: Tensor, model_options: dict[str, Any]
) -> list:
    """All conditionings as one batch, the last first."""
    parts = [(index, each) for index, of in enumerate(conds) for each in of][::-1]
    told = {**model_options["transformer_options"], "uuids": [each["uuid"] for _, each in parts]}
    context = torch.cat([each["model_conds"]["c_crossattn"].cond.expand(len(x), -1, -1) for _, each in parts])
    repeated = [torch.cat([each] * len(parts)) for each in (x, sigma)]
    answers = model.apply_model(*repeated, context, told).chunk(len(parts))
    return [
        torch.stack([answer for (of, _), answer in zip(parts, answers, strict=True) if of == index]).mean(0)
        for index in range(len(conds))
    ]


def _converted(conditioning: list) -> list[dict[str, Any]]:
    return [
        {**told, "uuid": uuid.uuid4(), "model_conds": {"c_crossattn": SimpleNamespace(cond=states)}}
        for states, told in conditioning
    ]


def sample_euler(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: Any
) -> Tensor:
    with torch.no_grad():
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
            callback({"x": x, "i": i, "denoised": denoised})
            x = x + (sigmas[i + 1] - sigmas[i]) * (x - denoised) / sigmas[i]
    return x


def sample_heun(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: Any
) -> Tensor:
    """Two calls a step, the second at the next step's noise level."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": i, "denoised": denoised})
        slope, width = (x - denoised) / sigmas[i], sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] > 0:
            trial = x + width * slope
            denoised = model(trial, sigmas[i + 1] * x.new_ones(len(x)), **extra_args)
            slope = (slope + (trial - denoised) / sigmas[i + 1]) / 2
        x = x + width * slope
    return x


def sample_forgetful(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: Any
) -> Tensor:
    """As UniPC, hands in a copy that is scaled, and goes on from its own."""
    for i in range(len(sigmas) - 1):
        denoised = model(x * 1.0, sigmas[i] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": i, "denoised": denoised})
        x = x + (sigmas[i + 1] - sigmas[i]) * (x - denoised) / sigmas[i]
    return x


def sample_adaptive(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: Any
) -> Tensor:
    """Steps by what the latents are."""
    for i in range(1 + int(float(x.abs().amax()) > 0)):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": i, "denoised": denoised})
    return x


def sampler(function: Callable = sample_euler) -> Any:
    return SimpleNamespace(sampler_function=function)


class SDTokenizer:
    """One encoder's tokenizer: segments of one weight, in chunks of 77."""

    def __init__(self) -> None:
        self.tokenizer = families.clip_tokenizer()

    def chunks(self, text: str) -> list[list[tuple[Any, float, int]]]:
        begin, end = self.tokenizer("")["input_ids"][:2]
        words = []
        for number, (segment, weight) in enumerate(token_weights(escape_important(text), 1.0), start=1):
            for part in unescape_important(segment).split(" embedding:vector"):
                ids = self.tokenizer(part)["input_ids"][1:-1]
                words += [(token, weight, number) for token in ids] + [(torch.zeros(WIDTH), weight, number)]
            words.pop()  # Between two parts there is a vector, after the last none.
        filled = []
        for at in range(0, max(len(words), 1), 75):
            chunk = [(begin, 1.0, 0), *words[at : at + 75], (end, 1.0, 0)]
            filled.append(chunk + [(end, 1.0, 0)] * (77 - len(chunk)))
        return filled


class Clip:
    """The host's CLIP, with random embeddings of tokens."""

    def __init__(self) -> None:
        self.cond_stage_model = SimpleNamespace(clip_l=True)
        self.tokenizer = SimpleNamespace(clip_l=SDTokenizer())

    def tokenize(self, text: str, return_word_ids: bool = False) -> dict[str, list]:
        return {"l": self.tokenizer.clip_l.chunks(text)}

    def encode_from_tokens_scheduled(self, tokens: dict[str, list]) -> list:
        states = []
        for token, weight, _ in (each for chunk in tokens["l"] for each in chunk):
            seed = token if isinstance(token, int) else 7
            states.append(weight * torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)))
        return [[torch.stack(states)[None], {"pooled_output": None}]]


@contextmanager
def executing() -> Iterator[None]:
    """As the host runs nodes, and loads models."""
    with torch.inference_mode():
        yield


def model() -> ModelPatcher:
    """A MODEL whose weights are born in inference mode."""
    with executing(), torch.random.fork_rng():
        torch.manual_seed(0)
        network = BaseModel()
        for weights in network.parameters():
            weights.mul_(3)
        return ModelPatcher(network)

"""Trains stickers-joint: Stable Diffusion 3's transformer, with joint attention, on the generator's scenes.

`python -m training.joint --init FOLDER` learns from the UNet of a model folder, on latents of its
autoencoder (`--latents`) and through its text encoder, which stays as it is. What the UNet takes for the
noise tells the way from noise to picture, with less noise in it than the scene's own; it is asked once for
each noisy scene, and its answer kept for the passes to come. From the image's
patches to the words attention is grounded as the UNet's is, and now and then each sticker's patches see
their own phrase alone.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from training.generator import (
    GROUNDING,
    SHARES,
    SHEET_EVERY,
    SHEET_PROMPTS,
    Batch,
    Copy,
    Parts,
    draw_batch,
    fade,
    faster_dtype,
    load_parts,
    predict,
    rate_at,
)
from training.grounding import KeepMaps, grounding_loss, own_phrases
from training.latents import CHUNK, Chunk, load_chunk
from training.loop import Average, average_over_processes, join_processes, train, use_one_thread
from training.muon import Muon
from training.sheets import save_sheet
from training.vae import to_images
from training.words import token_ids

BLOCKS, HEADS, HEAD_WIDTH, PATCH = 8, 4, 48, 2
# The pipeline's columns of zeros for a T5 that isn't there. Equal columns stay equal through all blocks, so
# that one is computed and counts for all of them.
NO_T5 = 256
SECOND_WIDTH = 16  # of the second text encoder, which the class asks for: as small as can be
SEED = 7
GUIDANCE = 7.0


def projecting(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The text encoder as Stable Diffusion 3 wants it: its pooled output is its own, projected by nothing."""
    config = CLIPTextConfig(**{**encoder.config.to_dict(), "projection_dim": encoder.config.hidden_size})
    projected = CLIPTextModelWithProjection(config)
    projected.text_model.load_state_dict(encoder.state_dict())
    torch.nn.init.eye_(projected.text_projection.weight)
    return projected.requires_grad_(False).eval()


def second_encoder(first: CLIPTextModelWithProjection) -> CLIPTextModelWithProjection:
    """The least text encoder that the class accepts; all that is told is in the first one."""
    torch.manual_seed(SEED)
    config = CLIPTextConfig(
        **{
            **first.config.to_dict(),
            "hidden_size": SECOND_WIDTH,
            "intermediate_size": SECOND_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "projection_dim": SECOND_WIDTH,
        }
    )
    return CLIPTextModelWithProjection(config).requires_grad_(False).eval()


def new_transformer(text_width: int) -> SD3Transformer2DModel:
    """The transformer, untrained: it has not seen a picture."""
    torch.manual_seed(SEED)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=PATCH,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        caption_projection_dim=HEADS * HEAD_WIDTH,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    # As in DiT, a block adds nothing at first; the maps find their words sooner.
    modulations = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")
    for name, layer in transformer.named_modules():
        if name.endswith(modulations):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return transformer


@dataclass(frozen=True)
class Words:
    """The two text encoders, and where their words stand among the columns that a patch attends to."""

    first: CLIPTextModelWithProjection
    second: CLIPTextModelWithProjection

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """B x (T + 1) x C states and B x C pooled, as `StableDiffusion3Pipeline` makes them without a T5: the
        states before the last layer, and one column of zeros for its `NO_T5`."""
        told = [encoder(ids, output_hidden_states=True) for encoder in (self.first, self.second)]
        states = torch.cat([each.hidden_states[-2] for each in told], dim=-1)
        pooled = torch.cat([each.text_embeds for each in told], dim=-1)
        return torch.cat([states, torch.zeros_like(states[:, :1])], dim=1), pooled


class KeepJointMaps:
    """A joint attention processor that also hands the image's attention to the words to `maps`.

    The last column of the words counts for `repeats` that are like it. `allowed`, one of the transformer's
    `joint_attention_kwargs`, is B x patches x T bool: the words that an image's patches may attend to.
    """

    def __init__(self, maps: list[Tensor] | None, repeats: int = NO_T5) -> None:
        self.maps, self.repeats = maps, repeats

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        patches = hidden_states.shape[1]

        def heads(states: Tensor, norm: torch.nn.Module | None) -> Tensor:
            split = states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        query, key, value = (
            torch.cat([heads(image(hidden_states), norm), heads(text(encoder_hidden_states), text_norm)], 2)
            for image, text, norm, text_norm in (
                (attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q),
                (attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k),
                (attn.to_v, attn.add_v_proj, None, None),
            )
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        bias = torch.zeros_like(scores[:, :1])
        bias[..., -1] = math.log(self.repeats)
        if allowed is not None:
            words = slice(patches, patches + allowed.shape[-1])
            bias[:, 0, :patches, words].masked_fill_(~allowed, -torch.inf)
        attention = (scores + bias).softmax(dim=-1)
        if self.maps is not None:
            self.maps.append(attention[:, :, :patches, patches:].mean(dim=1, dtype=torch.float32))
        mixed = (attention @ value).transpose(1, 2).flatten(2)
        image, text = mixed[:, :patches], mixed[:, patches:]
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def words_and_rest(attention: Tensor, roles: Tensor) -> Tensor:
    """B x patches x T maps for `grounding_loss`: <sot>'s column gets all that words of the stickers and the
    place don't have, on other patches of the image for the most part.

    `attention` is B x patches x at least T, `roles` B x 4 x T.
    """
    count = roles.shape[-1]
    told = (roles > 0).any(dim=1)
    told[:, 0] = False
    words = attention[..., :count] * told[:, None]
    return torch.cat([1 - words.sum(dim=-1, keepdim=True), words[..., 1:]], dim=-1)


@dataclass(frozen=True)
class FlowBatch:
    """B scenes on their way from noise: `noisy` is (1 - sigma) latents + sigma noise."""

    scenes: Batch
    noisy: Tensor
    sigma: Tensor


def as_flow(scenes: Batch, times: int) -> FlowBatch:
    """The generator's batch, of so many times, on the straight way: noise levels are logit-normal, as Stable
    Diffusion 3's, and as evenly spread as the times; one in five is uniform, since pictures begin where
    hardly any of the others is."""
    even = (scenes.times + 0.5) / times
    sigma = torch.where(scenes.times % 5 == 0, even, torch.special.ndtri(even).sigmoid())
    at = sigma[:, None, None, None]
    noisy = (1 - at) * scenes.latents + at * scenes.noise
    return FlowBatch(scenes, noisy, sigma)


@torch.no_grad()
def taught(batch: FlowBatch, teacher: Parts, known: Tensor, allowed: dict[int, Tensor] | None) -> Tensor:
    """What to predict: the flow as the UNet sees it, which `known`, its B x T x C text, tells what is there,
    under the masks `allowed`.

    Its noise schedule is another, so its input is scaled, and its time is the one with as much noise in it.
    Where a scene is noisier than the UNet ever saw one, it is asked what picture it expects at its last time.
    """
    kept = teacher.scheduler.alphas_cumprod
    noisiness = ((1 - kept) / kept).sqrt()
    ratio = batch.sigma / (1 - batch.sigma)
    times = torch.searchsorted(noisiness, ratio).clamp(max=len(kept) - 1)
    at = batch.sigma[:, None, None, None]
    scale = ((1 - at).square() + at.square()).sqrt()
    seen = replace(batch.scenes, noisy=batch.noisy / scale, times=times)
    noise = predict(teacher.unet, seen, known, allowed)
    latents = (batch.noisy - at * noise) / (1 - at)
    expected = seen.noisy / kept[-1].sqrt() - noisiness[-1] * noise
    beyond = (ratio > noisiness[-1])[:, None, None, None]
    return torch.where(beyond, (batch.noisy - expected) / at, noise - latents)


def losses(
    transformer: SD3Transformer2DModel,
    words: Words,
    target: Tensor,
    maps: list[Tensor],
    batch: FlowBatch,
    allowed: dict[int, Tensor],
) -> tuple[Tensor, Tensor]:
    """The flow's loss, from `target`, and the grounding loss, under the masks `allowed`; `transformer` may be
    of another precision, `maps` is the list that its processors fill."""
    maps.clear()
    states, pooled = words(batch.scenes.ids)
    own = allowed[(batch.noisy.shape[-1] // PATCH) ** 2]
    # The zeros hear all the words in the first block.
    empty = ~batch.scenes.masked[:, None, None].expand(-1, own.shape[1], 1)
    kwargs = {"allowed": torch.cat([own, empty], dim=-1)}
    times = 1000 * batch.sigma
    told = (part.to(transformer.dtype) for part in (batch.noisy, states, pooled))
    guess = transformer(*told, times, joint_attention_kwargs=kwargs).sample
    flow = (guess.float() - target).square().mean()
    seen = [words_and_rest(attention, batch.scenes.roles) for attention in maps]
    trust = (1 - batch.sigma) * batch.scenes.captioned
    grounding = trust * grounding_loss(seen, batch.scenes.places, batch.scenes.roles, SHARES)
    return flow, grounding.mean()


@torch.no_grad()
def sample(
    transformer: SD3Transformer2DModel, words: Words, teacher: Parts, prompts: list[str], seeds: list[int]
) -> np.ndarray:
    """N x 128 x 128 x 3 uint8 pictures, by Euler steps with guidance."""
    noise = [torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise)
    states, pooled = words(torch.from_numpy(token_ids(teacher.tokenizer, [""] * len(prompts) + prompts)))
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(25)
    for t in scheduler.timesteps:
        both = transformer(torch.cat([latents] * 2), states, pooled, t.expand(2 * len(latents))).sample
        empty, full = both.chunk(2)
        latents = scheduler.step(empty + GUIDANCE * (full - empty), t, latents).prev_sample
    return to_images(teacher.vae.decode(latents / teacher.vae.config.scaling_factor).sample)


def main() -> None:
    """Train, or go on with, the transformer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--init", type=Path, required=True, help="model folder to learn from")
    parser.add_argument("--weights", type=Path, help="an exported model of this kind, to go on from")
    parser.add_argument("--latents", type=Path, default=Path("runs/latents"))
    parser.add_argument("--chunks", type=int, default=16, help="chunks before the first repeats")
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument(
        "--passes", type=int, default=3, help="over the same noisy scenes: the teacher is asked in the first"
    )
    parser.add_argument("--batch", type=int, default=32, help="scenes a step, for each process")
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    use_one_thread()
    rank, world = join_processes()

    teacher = load_parts(arguments.init, arguments.init / "vae")
    for part in (teacher.unet, teacher.text_encoder, teacher.vae):
        part.requires_grad_(False)
    teacher.unet.set_attn_processor(KeepMaps(None))
    first = projecting(teacher.text_encoder)
    words = Words(first, second_encoder(first))
    if arguments.weights:
        transformer = SD3Transformer2DModel.from_pretrained(
            arguments.weights, subfolder="transformer", torch_dtype=torch.float32
        )
    else:
        transformer = new_transformer(first.config.hidden_size + SECOND_WIDTH)
    transformer.set_attn_processor(KeepJointMaps(None))
    dtype = faster_dtype("cpu")
    teacher.unet.to(dtype)
    teaching = replace(teacher, unet=torch.compile(teacher.unet))
    # Not compiled itself: in bfloat16 torch 2.13 writes C++ of it that no compiler takes.
    swift = Copy(transformer, dtype)
    maps: list[Tensor] = []
    # The first blocks haven't heard yet what the words mean to the picture.
    swift.network.set_attn_processor(
        {
            name: KeepJointMaps(maps if int(name.split(".")[1]) >= BLOCKS // 4 else None)
            for name in transformer.attn_processors
        }
    )
    trained = list(transformer.parameters())
    optimiser = Muon(trained, lr=arguments.rate, dtype=dtype)
    average = Average([transformer], decay=0.998)
    folder, batch = arguments.runs / "joint", arguments.batch
    loaded: dict[int, Chunk] = {}
    targets: dict[int, Tensor] = {}
    unlike = math.ceil(arguments.steps / arguments.passes)

    def take_step(n: int) -> dict[str, float]:
        over, block = n / arguments.steps, n % unlike * world + rank
        for group in optimiser.param_groups:
            group["lr"] = arguments.rate * rate_at(n, over)
        number = block * batch // CHUNK % arguments.chunks
        if number not in loaded:
            loaded[number] = load_chunk(arguments.latents, number, teacher.vae, teacher.tokenizer)
        scenes = draw_batch(loaded[number], block, batch, teacher)
        drawn = as_flow(scenes, len(teacher.scheduler.alphas_cumprod))
        allowed = own_phrases(scenes.nearest, scenes.roles, scenes.masked)
        if block not in targets:
            known = teacher.text_encoder(scenes.ids).last_hidden_state
            targets[block] = taught(drawn, teaching, known, allowed).half()
        swift.update()
        optimiser.zero_grad(set_to_none=True)
        flow, grounding = losses(swift.network, words, targets[block].float(), maps, drawn, allowed)
        (flow + GROUNDING * fade(over) * grounding).backward()
        swift.return_gradients()
        average_over_processes(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        average.update()
        return {"flow": flow.item(), "grounding": grounding.item()}

    def on_save(step: int) -> None:
        average.swap()
        transformer.save_pretrained(folder / "transformer")
        if step // SHEET_EVERY != sheets[0] or step == arguments.steps:
            sheets[0] = step // SHEET_EVERY
            prompts = [prompt for prompt in SHEET_PROMPTS for _ in range(4)]
            images = sample(transformer, words, teacher, prompts, list(range(4)) * len(SHEET_PROMPTS))
            save_sheet(folder / f"sheet-{step:05}.png", list(images), prompts)
        average.swap()

    sheets = [0]
    state = {"transformer": transformer, "optimiser": optimiser, "average": average}
    train(folder, state, take_step, arguments.steps, on_save, writes=rank == 0, weights=arguments.weights)


if __name__ == "__main__":
    main()

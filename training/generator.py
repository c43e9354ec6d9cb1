"""Trains the text encoder and the UNet together on encoded scenes.

`python -m training.generator --init FOLDER --vae FOLDER` goes on from the `text_encoder`
and `unet` of a model folder; `--latents` names the encoded scenes of that autoencoder.
The denoising loss is weighted by min-SNR (gamma 5), the grounding loss keeps the
cross-attention of every subject on its own sticker, and now and then each sticker's patches see
their own phrase alone. The learning rate falls in a line from the first fifth of the run to its end. In the
last fifth a caption learns to pull less, so that guidance of 7.5, which is right for Stable Diffusion, is
right here too.

Where `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` are set, as `torchrun` sets them, the processes
train together, each on a batch of its own.

Passes are made with a copy of the UNet in bfloat16 where that is faster; the weights stay in float32.
`training/gpu.sh` is all of it, the scenes included, in a few minutes of a GPU.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.grounding import grounding_loss, keep_maps, own_phrases
from training.latents import CHUNK, Chunk, load_chunk
from training.loop import (
    Average,
    average_over_processes,
    check_way_back,
    join_processes,
    train,
    use_one_thread,
)
from training.muon import Muon
from training.sheets import save_sheet
from training.vae import load_vae, to_images
from training.words import token_ids

SNR_LIMIT = 5.0
GROUNDING = 0.03
# What a noun and its colour should have of the attention of the patches that they are drawn on.
SHARES = 0.12, 0.05
CAPTION_DROPOUT = 0.12
MASKED = 0.4  # of the scenes of several stickers
# Captions that always tell the truth pull hard: at guidance 7.5 blue turned to cyan and brown
# to black, at 4 they were right. Scaled by this, the pull at 7.5 is what it was at 4.
KEPT_PULL = 4 / 7.5
SEED = 4
SHEET_EVERY = 500
SHEET_PROMPTS = (
    "a cat", "a red car", "a cat and a frog", "a dog and a blue balloon",
    "a lion with a crown", "a red bow and a blue bowl", "a horse and a green bench",
    "a turtle on the grass",
)  # fmt: skip


@dataclass
class Parts:
    """What turns words into pictures."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler

    def text(self, prompts: list[str]) -> Tensor:
        """B x T x C, the text encoder's last hidden states."""
        ids = torch.from_numpy(token_ids(self.tokenizer, prompts)).to(self.unet.device)
        return self.text_encoder(ids).last_hidden_state


def load_parts(folder: Path, vae: Path) -> Parts:
    """The parts of a model folder, in float32, with another autoencoder."""
    kind = {"torch_dtype": torch.float32}
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **kind)
    return Parts(
        CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32),
        unet.to(memory_format=torch.channels_last),
        load_vae(vae),
        DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
    )


@dataclass(frozen=True)
class Batch:
    """B noisy scenes, drawn from a chunk by the number of the step alone.

    `latents`, `noise` and `noisy` are B x 4 x 16 x 16; `ids` B x T, `places`, `nearest` and `roles` as in
    `latents.Chunk`; `times` B indices into the noise schedule; `captioned` and `masked` B bool.
    """

    latents: Tensor
    noise: Tensor
    noisy: Tensor
    times: Tensor
    ids: Tensor
    captioned: Tensor
    masked: Tensor
    places: Tensor
    nearest: Tensor
    roles: Tensor


def draw_batch(chunk: Chunk, n: int, size: int, parts: Parts) -> Batch:
    """The batch of step `n`: the chunk's next scenes, at times spread over the schedule."""
    rows = np.arange(n * size, (n + 1) * size) % CHUNK
    rng = torch.Generator().manual_seed(SEED * 1_000_000 + n)
    latents = torch.from_numpy(chunk.latents[rows]).float()
    ids = torch.from_numpy(chunk.ids[rows])
    dropped = torch.rand(size, generator=rng) < CAPTION_DROPOUT
    ids[dropped] = torch.from_numpy(token_ids(parts.tokenizer, [""]))
    # One time from each of `size` equal spans: an evenly spread batch learns steadier.
    spread = (torch.arange(size) + torch.rand(size, generator=rng)) / size
    kept = parts.scheduler.alphas_cumprod
    times = (spread[torch.randperm(size, generator=rng)] * len(kept)).long()
    noise = torch.randn(latents.shape, generator=rng)
    signal = kept[times][:, None, None, None]
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    layouts = (torch.from_numpy(part[rows]) for part in (chunk.places, chunk.nearest, chunk.roles))
    places, nearest, roles = layouts
    several = nearest.flatten(1).amax(dim=1) > 1
    masked = several & ~dropped & (torch.rand(size, generator=rng) < MASKED)
    drawn = (latents, noise, noisy, times, ids, ~dropped, masked, places, nearest, roles)
    return Batch(*(part.to(parts.unet.device) for part in drawn))


def predict(unet: UNet2DConditionModel, batch: Batch, text: Tensor, allowed: dict | None) -> Tensor:
    """What a UNet, of whatever precision, takes for the noise; `allowed` as in `grounding.KeepMaps`."""
    noisy = batch.noisy.to(unet.dtype, memory_format=torch.channels_last)
    kwargs = {"allowed": allowed}
    return unet(noisy, batch.times, text.to(unet.dtype), cross_attention_kwargs=kwargs).sample.float()


@torch.no_grad()
def weakened(unet: UNet2DConditionModel, parts: Parts, batch: Batch, pull: float) -> Tensor:
    """What to predict where a caption counts for the share `pull`: the noise, drawn back
    towards what the UNet says without a caption. Without a caption: the noise."""
    if pull == 1:
        return batch.noise
    blind = predict(unet, batch, parts.text([""]).expand(len(batch.noise), -1, -1), None)
    return torch.where(batch.captioned[:, None, None, None], blind.lerp(batch.noise, pull), batch.noise)


def losses(
    unet: UNet2DConditionModel, parts: Parts, maps: list[Tensor], batch: Batch, pull: float
) -> tuple[Tensor, Tensor]:
    """The denoising loss, weighted by min-SNR, and the grounding loss.

    `unet` is that of `parts` or a copy; `maps` is the list that `grounding.keep_maps` fills for it; `pull`
    as in `weakened`.
    """
    target = weakened(unet, parts, batch, pull)
    maps.clear()
    text = parts.text_encoder(batch.ids).last_hidden_state
    allowed = own_phrases(batch.nearest, batch.roles, batch.masked)
    guess = predict(unet, batch, text, allowed)
    signal = parts.scheduler.alphas_cumprod.to(batch.times.device)[batch.times]
    snr = signal / (1 - signal)
    weight = snr.clamp(max=SNR_LIMIT) / snr
    denoising = weight * (guess - target).square().mean(dim=(1, 2, 3))
    # In pure noise nobody can know yet where a sticker will be.
    trust = signal.sqrt() * batch.captioned
    grounding = trust * grounding_loss(maps, batch.places, batch.roles, SHARES)
    return denoising.mean(), grounding.mean()


def faster_dtype(device: str) -> torch.dtype:
    """float32 or bfloat16: not every CPU that has instructions for bfloat16 is faster with them."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16

    last = torch.channels_last

    def seconds(dtype: torch.dtype) -> float:
        convolution = torch.nn.Conv2d(128, 128, 3, padding=1, dtype=dtype).to(memory_format=last)
        images = torch.ones(32, 128, 16, 16, dtype=dtype).to(memory_format=last)
        took = []
        for _ in range(5):
            began = time.perf_counter()
            convolution(images)
            took.append(time.perf_counter() - began)
        return min(took)

    return min((torch.float32, torch.bfloat16), key=seconds)


def compiled(network: UNet2DConditionModel) -> Any:
    """The network compiled, but for its upsampling: of that and what stands around it torch 2.13 makes, on a
    CPU, a way back on which the gradient is lost, without a word. In bfloat16 nearly all of it."""
    for block in network.up_blocks:
        for upsampler in block.upsamplers or ():
            upsampler.forward = torch.compiler.disable(upsampler.forward)
    # Around what isn't compiled each layer is compiled for itself, with and without gradients.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(network, dynamic=False)


class Copy:
    """A copy of a network in another precision, in which passes are made."""

    def __init__(self, network: torch.nn.Module, dtype: torch.dtype) -> None:
        self.network: Any = copy.deepcopy(network).to(dtype)
        self._pairs = list(zip(network.parameters(), self.network.parameters(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's weights."""
        for weights, copied in self._pairs:
            copied.copy_(weights)

    def return_gradients(self) -> None:
        """Hand what the copy's passes gave to the network's own parameters."""
        for weights, copied in self._pairs:
            weights.grad = None if copied.grad is None else copied.grad.to(weights.dtype)
            copied.grad = None


@torch.no_grad()
def sample(
    parts: Parts, prompts: list[str], seeds: list[int], steps: int = 50, guidance: float = 7.5
) -> np.ndarray:
    """N x 128 x 128 x 3 uint8 pictures, one for each prompt and seed, by DDIM."""
    shape = (parts.unet.config.in_channels, *[parts.unet.config.sample_size] * 2)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    latents = torch.stack(noise).to(parts.unet.device)
    text = parts.text([""] * len(prompts) + prompts)
    parts.scheduler.set_timesteps(steps)
    for t in parts.scheduler.timesteps:
        empty, full = parts.unet(torch.cat([latents] * 2), t, text).sample.chunk(2)
        guided = empty + guidance * (full - empty)
        latents = parts.scheduler.step(guided, t, latents).prev_sample
    return to_images(parts.vae.decode(latents / parts.vae.config.scaling_factor).sample)


def rate_at(step: int, progress: float, warmup: int = 100) -> float:
    """The learning rate's factor: rises over the first steps, stays at 1, and falls in a line over the last
    four fifths of the run; `progress` is the share of it that is over."""
    return min(1.0, (step + 1) / warmup, max(0.02, 1.25 * (1 - progress)))


def fade(progress: float) -> float:
    """The grounding loss's factor: 1, falling to a third over the last fifth."""
    return 1 - (2 / 3) * max(0.0, 5 * (progress - 4 / 5))


def pull_at(progress: float) -> float:
    """The share of its pull that a caption keeps: all of it, falling over the first half of the last
    fifth of the run."""
    return 1 - (1 - KEPT_PULL) * min(1.0, max(0.0, 10 * (progress - 4 / 5)))


def save_halved(parts: Parts, folder: Path) -> None:
    """Write UNet and text encoder in half precision, as they ship, in files of at most 12 MB where weights
    can be split."""
    for name, part in (("unet", parts.unet), ("text_encoder", parts.text_encoder)):
        halved = copy.deepcopy(part).to("cpu", torch.float16)
        halved.save_pretrained(folder / name, max_shard_size="12MB")


def main() -> None:
    """Train, or go on with, the generator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--init", type=Path, required=True, help="model folder to start from")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument("--latents", type=Path, default=Path("runs/latents"))
    parser.add_argument("--chunks", type=int, default=16, help="chunks before the first repeats")
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--minutes", type=float, help="stop after so many, in place of --steps")
    parser.add_argument("--save-seconds", type=float, default=150)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64, help="scenes a step, for each process")
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    use_one_thread()
    rank, world = join_processes()
    if world > 1 and arguments.minutes is not None:
        parser.error("several processes end together by --steps; leave out --minutes")
    if arguments.minutes is not None and (arguments.runs / "generator" / "checkpoint.pt").exists():
        parser.error("a run by the clock can't go on where another stopped: give --steps, or other --runs")

    parts = load_parts(arguments.init, arguments.vae)
    parts.vae.requires_grad_(False)
    for part in (parts.vae, parts.unet, parts.text_encoder):
        part.to(arguments.device)
    dtype = faster_dtype(arguments.device)
    swift = Copy(parts.unet, dtype)
    maps = keep_maps(swift.network)
    fast = compiled(swift.network)
    trained = [*parts.unet.parameters(), *parts.text_encoder.parameters()]
    embeddings = parts.text_encoder.get_input_embeddings().parameters()
    optimiser = Muon(trained, lr=arguments.rate, sparse=embeddings, dtype=dtype)
    average = Average([parts.unet, parts.text_encoder], decay=0.995)
    folder = arguments.runs / "generator"
    batch = arguments.batch
    loaded: dict[int, Chunk] = {}

    def chunk_of(block: int) -> Chunk:
        number = block * batch // CHUNK % arguments.chunks
        if number not in loaded:
            loaded[number] = load_chunk(arguments.latents, number, parts.vae, parts.tokenizer)
        return loaded[number]

    def progress(n: int) -> float:
        if arguments.minutes is None:
            return n / arguments.steps
        return min(1.0, (time.monotonic() - began) / (60 * arguments.minutes))

    def take_step(n: int) -> dict[str, float]:
        over = progress(n)
        for group in optimiser.param_groups:
            group["lr"] = arguments.rate * rate_at(n, over)
        block = n * world + rank
        drawn = draw_batch(chunk_of(block), block, batch, parts)
        swift.update()
        optimiser.zero_grad(set_to_none=True)
        denoising, grounding = losses(fast, parts, maps, drawn, pull_at(over))
        (denoising + GROUNDING * fade(over) * grounding).backward()
        swift.return_gradients()
        average_over_processes(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        average.update()
        return {"denoising": denoising.item(), "grounding": grounding.item()}

    def on_save(step: int) -> None:
        average.swap()
        save_halved(parts, folder)
        if step // SHEET_EVERY != sheets[0] or progress(step) == 1:
            sheets[0] = step // SHEET_EVERY
            prompts = [prompt for prompt in SHEET_PROMPTS for _ in range(4)]
            # As far as captions pull now: 4 before they learn to pull less, 7.5 afterwards.
            guidance = 7.5 * KEPT_PULL / pull_at(progress(step))
            seeds = list(range(4)) * len(SHEET_PROMPTS)
            images = sample(parts, prompts, seeds, steps=25, guidance=guidance)
            save_sheet(folder / f"sheet-{step:05}.png", list(images), prompts)
        average.swap()

    # Compiled before the clock starts: in the last fifth there is no time for it.
    drawn = draw_batch(chunk_of(rank), rank, batch, parts)
    weakened(fast, parts, drawn, KEPT_PULL)
    check_way_back(swift.network, fast, lambda network: losses(network, parts, maps, drawn, 1.0)[0])
    sheets, began = [0], time.monotonic()
    state = {
        "unet": parts.unet,
        "text_encoder": parts.text_encoder,
        "optimiser": optimiser,
        "average": average,
    }
    limited = arguments.minutes is not None
    train(
        folder,
        state,
        take_step,
        sys.maxsize if limited else arguments.steps,
        on_save,
        save_seconds=arguments.save_seconds,
        seconds=60 * arguments.minutes if limited else math.inf,
        writes=rank == 0,
    )


if __name__ == "__main__":
    main()

"""Trains the autoencoder: pictures of 128x128 pixels to latents of 4x16x16 and back.

`python -m training.vae --init FOLDER` goes on from the `vae` of a model folder and keeps
the new latents near the old ones, so that a UNet trained on those stays of use.
`--decoder-only` polishes the decoder of the last run and leaves the latents as they are; with
`--channels` it starts as a wider network that computes the same. `--measure` trains nothing: it prints
the PSNR of the `vae` of `--init` on the test scenes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.glyphs import GlyphBox, generator_glyphs
from training.loop import Average, train, use_one_thread, warmup_cosine
from training.muon import Muon
from training.scenes import SIZE, draw_scene
from training.sheets import save_sheet

CROP = 64
BATCH = 8
PULL = 0.1  # weight of the new latents' distance from the old ones
NOISE = 0.04  # added to the latents, so that the decoder forgives the generator
SQUARES = 3.0  # weight of squared errors: they count more than absolute ones where pixels are far off
STICKER_WEIGHT = 3.0  # a sticker's pixel counts this much more than the background's
TRAIN_SEED, TEST_SEED = 1, 2


def load_vae(folder: Path) -> AutoencoderKL:
    """An autoencoder in float32, laid out as convolutions like it."""
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    return vae.to(memory_format=torch.channels_last)


@torch.no_grad()
def widened(vae: AutoencoderKL, channels: tuple[int, ...]) -> AutoencoderKL:
    """A network with more channels that computes the same (Net2Net; Chen et al., 2016).

    Each channel is there several times, side by side, so that groups of normalisation hold copies alone. What
    reads them divides its weights among the copies: evenly in the encoder, which keeps its latents but for
    rounding, unevenly in the decoder, since equal copies would learn the same.

    Raises:
        ValueError: `channels` are no multiples of the network's own.
    """
    own = vae.config["block_out_channels"]
    if len(channels) != len(own) or any(more % few for more, few in zip(channels, own, strict=True)):
        raise ValueError(f"the channels {channels} are no multiples of the network's own, {tuple(own)}")
    wide = AutoencoderKL.from_config({**vae.config, "block_out_channels": channels})
    narrow = vae.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, weight in wide.state_dict().items():
        old = narrow[name]
        new = old.repeat_interleave(len(weight) // len(old), dim=0)
        if old.ndim > 1 and (copies := weight.shape[1] // old.shape[1]) > 1:
            shares = torch.ones(len(new), old.shape[1], copies, 1, 1)
            if name.startswith("decoder"):
                shares = shares / 2 + torch.rand(shares.shape, generator=generator)
            shares = (shares / shares.sum(dim=2, keepdim=True)).flatten(1, 2)
            new = new.repeat_interleave(copies, dim=1) * shares
        weight.copy_(new)
    return wide.to(memory_format=torch.channels_last)


def to_tensor(images: np.ndarray) -> Tensor:
    """NxHxWx3 uint8 to Nx3xHxW floats in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return (tensor.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_images(tensor: Tensor) -> np.ndarray:
    """The inverse of `to_tensor`."""
    pixels = ((tensor.float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


@torch.no_grad()
def through(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """NxHxWx3 uint8 pictures, encoded and decoded."""
    parts = to_tensor(images).split(32)
    return np.concatenate([to_images(vae.decode(vae.encode(part).latent_dist.mean).sample) for part in parts])


def crops(box: GlyphBox, step: int, side: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` crops around stickers and the weights of their pixels (countx1xsidexside)."""
    images, weights = [], []
    for index in range(step * count, (step + 1) * count):
        scene = draw_scene(box, TRAIN_SEED, index)
        rng = np.random.default_rng((TRAIN_SEED, index, 1))
        cover = scene.cover.max(axis=0)
        ys, xs = np.nonzero(cover > 0.5)
        at = rng.integers(len(ys))
        y, x = (int(np.clip(v[at] - rng.integers(side), 0, SIZE - side)) for v in (ys, xs))
        images.append(scene.image[y : y + side, x : x + side])
        weights.append(1 + STICKER_WEIGHT * cover[y : y + side, x : x + side])
    return to_tensor(np.stack(images)), torch.from_numpy(np.stack(weights)[:, None])


def _edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.diff(dim=2), images.diff(dim=3)


def reconstruction_loss(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Absolute and squared error of pixels, and absolute error of edges, weighted."""
    weight = weight / weight.mean()
    error = output - target
    pixels = (weight * (error.abs() + SQUARES * error.square())).mean()
    rows, columns = _edges(error)
    edges = (weight[:, :, 1:] * rows.abs()).mean() + (weight[..., 1:] * columns.abs()).mean()
    return pixels + 0.5 * edges


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio in dB of Nx128x128x3 uint8 images."""
    values = []
    for part in np.array_split(images, max(1, len(images) // 16)):
        restored = to_images(vae.decode(vae.encode(to_tensor(part)).latent_dist.mean).sample)
        error = np.square(restored.astype(float) - part).mean(axis=(1, 2, 3))
        values.extend(10 * np.log10(255**2 / error))
    return float(np.mean(values))


def main() -> None:
    """Train, or go on with, the autoencoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--init", type=Path, required=True, help="model folder to start from")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--side", type=int, default=CROP, help="side of the crops in pixels")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--channels", type=int, nargs=4, help="more channels for the network that --init has")
    parser.add_argument(
        "--bfloat16", action="store_true", help="faster where the CPU has instructions for it"
    )
    parser.add_argument("--measure", action="store_true", help="print the PSNR of --init, and no more")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    use_one_thread()

    box = GlyphBox(generator_glyphs())
    test_images = np.stack([draw_scene(box, TEST_SEED, i).image for i in range(64)])
    vae, teacher = (load_vae(arguments.init / "vae") for _ in range(2))
    if arguments.measure:
        print(f"{psnr(vae, test_images):.2f} dB")
        return
    if arguments.channels:
        vae = widened(vae, tuple(arguments.channels))
    vae.requires_grad_(not arguments.decoder_only)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimiser = Muon(trained, lr=arguments.rate, weight_decay=0)
    average = Average([vae], decay=0.99)

    folder = arguments.runs / ("decoder" if arguments.decoder_only else "vae")
    scale = vae.config.scaling_factor

    def take_step(n: int) -> dict[str, float]:
        for group in optimiser.param_groups:
            group["lr"] = arguments.rate * warmup_cosine(n, arguments.steps, warmup=50)
        images, weight = crops(box, n, arguments.side, arguments.batch)
        with torch.no_grad():
            old = teacher.encode(images).latent_dist.mean
        new = old if arguments.decoder_only else vae.encode(images).latent_dist.mean
        noise = torch.randn(new.shape, generator=torch.Generator().manual_seed(n))
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
            output = vae.decode(new + NOISE / scale * noise).sample
        restored = reconstruction_loss(output.float(), images, weight)
        pull = scale**2 * (new - old).square().mean()
        optimiser.zero_grad(set_to_none=True)
        (restored + PULL * pull).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        average.update()
        return {"restored": restored.item(), "pull": pull.item()}

    def on_save(step: int) -> None:
        average.swap()
        vae.save_pretrained(folder / "vae")
        value = psnr(vae, test_images)
        with (folder / "psnr.csv").open("a") as lines:
            lines.write(f"{step},{value:.3f}\n")
        with torch.no_grad():
            shown = to_tensor(test_images[:16])
            restored = to_images(vae.decode(vae.encode(shown).latent_dist.mean).sample)
        pairs = [image for pair in zip(test_images[:16], restored, strict=True) for image in pair]
        save_sheet(folder / "sheet.png", pairs, columns=8)
        average.swap()

    train(
        folder,
        {"vae": vae, "optimiser": optimiser, "average": average},
        take_step,
        arguments.steps,
        on_save,
    )


if __name__ == "__main__":
    main()

"""Trains the captioner: a small BLIP that says what is in a picture, colours included.

`python -m training.captioner` starts from the vision tower of `training.clip` and goes
through the same pictures; `--measure` measures the exported model on unseen
scenes of the generator's drawings.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPModel,
)

from training.captions import GRAMMAR, Mention, spoken
from training.clip import BLURS, HEADS, PATCH_LOSS, VISION_LAYERS, WIDTH, PatchHeads, mentions_of
from training.glyphs import COLOURS, SUBJECTS
from training.judge import softened
from training.loop import Average, train, use_one_thread, warmup_cosine
from training.muon import Muon
from training.pictures import (
    BACKGROUNDS,
    SEED,
    SIDE,
    Pictures,
    Stock,
    measure,
    trainee_arguments,
)
from training.vae import load_vae, to_tensor

PROMPT = "a picture of"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
TEXT_LAYERS = 2
CONTEXT = 32
SPEAKING = 0.4  # of the steps, the first: the text learns to speak of what the CLIP sees
TEST_SCENES = 400


def words() -> list[str]:
    """The captioner's vocabulary, in the order of its tokens."""
    plurals = [GRAMMAR["plurals"].get(subject, subject + "s") for subject in SUBJECTS]
    places = " ".join(GRAMMAR["spoken_places"].values()).split()
    spoken_words = [*PROMPT.split(), "an", "and", "two", *SUBJECTS, *plurals, *COLOURS, *places]
    return [*SPECIAL, *dict.fromkeys(spoken_words)]


def new_tokenizer() -> BertTokenizer:
    """BERT's tokenizer with whole words alone; as in BLIP, [DEC] begins a caption."""
    vocabulary = {word: number for number, word in enumerate(words())}
    return BertTokenizer(vocab=vocabulary, bos_token="[DEC]", model_max_length=CONTEXT)


def new_captioner(tokenizer: BertTokenizer) -> BlipForConditionalGeneration:
    """The vision tower of the small CLIP and two layers of text that look at it."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS}
    text = {
        **shape,
        "encoder_hidden_size": WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "max_position_embeddings": CONTEXT,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        **shape,
        "num_hidden_layers": VISION_LAYERS,
        "image_size": SIDE,
        "patch_size": 8,
        "hidden_act": "quick_gelu",
        "initializer_range": 0.02,
    }
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    return BlipForConditionalGeneration(config)


@torch.no_grad()
def take_over(captioner: BlipForConditionalGeneration, tower: nn.Module, images: Tensor) -> None:
    """Copy CLIP's vision tower. BLIP has no norm after the embeddings, so they are scaled to
    be as large as after CLIP's on `images`; training mends the rest."""
    given = tower.state_dict()
    scale = given["pre_layrnorm.weight"] / tower.embeddings(images).std(dim=-1).mean()
    patches = given["embeddings.patch_embedding.weight"] * scale[:, None, None, None]
    taken = {
        "embeddings.patch_embedding.weight": patches,
        "embeddings.patch_embedding.bias": given["pre_layrnorm.bias"],
        "embeddings.class_embedding": (given["embeddings.class_embedding"] * scale)[None, None],
        "embeddings.position_embedding": (given["embeddings.position_embedding.weight"] * scale)[None],
    }
    for name in captioner.vision_model.state_dict():
        if ".qkv." in name:
            taken[name] = torch.cat([given[name.replace("qkv", f"{part}_proj")] for part in "qkv"])
        elif name not in taken:
            taken[name] = given[name.replace("projection", "out_proj")]
    captioner.vision_model.load_state_dict(taken)


def captions_of(pictures: Pictures) -> list[str]:
    """What the captioner is to say."""
    return [
        f"{PROMPT} {spoken(mentions_of(mentions), BACKGROUNDS[background])}"
        for mentions, background in zip(pictures.mentions, pictures.backgrounds, strict=True)
    ]


def caption_ids(tokenizer: BertTokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """N x T, [DEC] first and [SEP] last, and the same with -100 for the padding."""
    ids = tokenizer(captions, padding=True, return_tensors="pt").input_ids
    ids[:, 0] = tokenizer.bos_token_id
    return ids, ids.masked_fill(ids == tokenizer.pad_token_id, -100)


def export(captioner: BlipForConditionalGeneration, tokenizer: BertTokenizer, folder: Path) -> None:
    """Write model, tokenizer and image processor."""
    small = BlipForConditionalGeneration(captioner.config)
    small.load_state_dict(captioner.state_dict())
    small.half().save_pretrained(folder)
    images = BlipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    BlipProcessor(images, tokenizer).save_pretrained(folder)


def read(caption: str) -> list[Mention]:
    """The stickers that a caption names, in its order."""
    singular = {GRAMMAR["plurals"].get(subject, subject + "s"): subject for subject in SUBJECTS}
    said, before = [], ""
    tokens = caption.split()
    for k, word in enumerate(tokens):
        twins = "two" in tokens[max(0, k - 2) : k]
        subject = singular.get(word) if twins else word
        if subject in SUBJECTS:
            said += [Mention(subject, before if before in COLOURS else None)] * (2 if twins else 1)
        before = word
    return said


@torch.no_grad()
def figures(
    captioner: BlipForConditionalGeneration, tokenizer: BertTokenizer, pictures: Pictures
) -> dict[str, float]:
    """What it says of N scenes, searched as for a benchmark (3 beams, 10 to 30 tokens).

    `word for word`: the caption is what it is to say; `exact`: it names the very stickers
    in the very colours, in any order; `subjects`: of the stickers shown, those named;
    `named rightly`: of those named, those shown; `colours`: of the colours to be said of
    stickers named, those said.
    """
    prompt = tokenizer([PROMPT] * len(pictures.images), return_tensors="pt").input_ids
    found = captioner.generate(
        pixel_values=to_tensor(pictures.images),
        input_ids=prompt,
        num_beams=3,
        min_length=10,
        max_length=30,
        do_sample=False,
    )
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    wanted = captions_of(pictures)
    exact = shown = named = hit = coloured = colour_hit = 0
    for text, row in zip(texts, pictures.mentions, strict=True):
        truth, said = mentions_of(row), read(text)
        exact += Counter(truth) == Counter(said)
        there, told = (Counter(m.subject for m in mentions) for mentions in (truth, said))
        shown, named, hit = shown + there.total(), named + told.total(), hit + (there & told).total()
        for mention in truth:
            if mention.colour and mention.subject in told:
                coloured += 1
                colour_hit += mention in said
    return {
        "word for word": float(np.mean([a == b for a, b in zip(texts, wanted, strict=True)])),
        "exact": exact / len(texts),
        "subjects": hit / shown,
        "named rightly": hit / max(1, named),
        "colours": colour_hit / max(1, coloured),
    }


def main() -> None:
    """Train, or go on with, the captioner; or measure it."""
    arguments = trainee_arguments(__doc__, steps=1200)
    use_one_thread()
    folder = arguments.runs / "captioner"
    if arguments.measure:
        captioner = BlipForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32).eval()
        tokenizer = BertTokenizer.from_pretrained(folder / "model")
        measure(folder, partial(figures, captioner, tokenizer), TEST_SCENES, arguments.init / "vae")
        return

    torch.manual_seed(0)
    tokenizer = new_tokenizer()
    captioner, heads = new_captioner(tokenizer), PatchHeads(WIDTH)
    stock = Stock(arguments.runs / "pictures", arguments.chunks, load_vae(arguments.init / "vae"))
    if arguments.weights:
        known = BlipForConditionalGeneration.from_pretrained(arguments.weights, dtype=torch.float32)
        captioner.load_state_dict(known.state_dict())
    else:
        clip = CLIPModel.from_pretrained(arguments.runs / "clip" / "model", dtype=torch.float32).eval()
        take_over(captioner, clip.vision_model, to_tensor(stock.batch(0, arguments.batch).images))
    embeddings = captioner.get_input_embeddings().parameters()
    optimiser = Muon([*captioner.parameters(), *heads.parameters()], lr=arguments.rate, sparse=embeddings)
    average = Average([captioner], decay=0.99)

    def take_step(n: int) -> dict[str, float]:
        for group in optimiser.param_groups:
            group["lr"] = arguments.rate * warmup_cosine(n, arguments.steps, warmup=50)
        captioner.vision_model.requires_grad_(n >= SPEAKING * arguments.steps)
        pictures, rng = stock.batch(n, arguments.batch), np.random.default_rng((SEED, 1, n))
        ids, wanted = caption_ids(tokenizer, captions_of(pictures))
        images = softened(to_tensor(pictures.images), rng, blurs=BLURS)
        output = captioner(pixel_values=images, input_ids=ids, labels=wanted)
        patches = heads.loss(output.image_embeds, pictures)
        optimiser.zero_grad(set_to_none=True)
        (output.loss + PATCH_LOSS * patches).backward()
        optimiser.step()
        average.update()
        return {"words": output.loss.item(), "patches": patches.item()}

    def on_save(_: int) -> None:
        average.swap()
        export(captioner, tokenizer, folder / "model")
        average.swap()

    state = {"captioner": captioner, "heads": heads, "optimiser": optimiser, "average": average}
    train(folder, state, take_step, arguments.steps, on_save, weights=arguments.weights)


if __name__ == "__main__":
    main()

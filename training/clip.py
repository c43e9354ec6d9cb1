"""Trains a small CLIP on pictures of scenes and words for them.

`python -m training.clip` goes through the chunks of `training.pictures`; `--measure`
measures the exported model on unseen scenes of the generator's glyphs. Beside the
contrast of pictures and words the vision tower is asked what is in each of its patches:
that teaches it to see in a tenth of the time.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from attend_excite.benchmark.metrics.clip import fill, templates
from training.captions import Mention, caption, every_word, spoken
from training.glyphs import COLOURS, SUBJECTS
from training.judge import UNCLEAR, softened
from training.loop import Average, train, use_one_thread, warmup_cosine
from training.muon import Muon
from training.pictures import (
    BACKGROUNDS,
    COLOUR_NAMES,
    NONE,
    SEED,
    SIDE,
    TEST_SEED,
    Pictures,
    Stock,
    measure,
    trainee_arguments,
)
from training.scenes import MOST_STICKERS, RULES
from training.vae import load_vae, to_tensor

WIDTH, HEADS = 128, 4
VISION_LAYERS, TEXT_LAYERS = 4, 3
CONTEXT = 32  # tokens; the longest template around the longest prompt has 24
TEMPLATED, SPOKEN = 0.4, 0.2  # of the texts; the others are the scenes' captions
PATCH_LOSS = 0.5
BLURS = (1, 1, 1, 2)  # pixels of 64
TEST_SCENES = 256
EMBEDDINGS = "text_model.embeddings.token_embedding.weight"
COLOUR_CODES = len(COLOURS) + 1  # none named, and each colour


def ends_of(tokenizer: CLIPTokenizer) -> list[int]:
    """The tokens that begin, end and pad a text."""
    return [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]


class Tokens:
    """Texts to the few of CLIP's tokens that our texts have, numbered anew: 150
    embeddings train in no time, CLIP's 49,408 take as long as all the rest."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        seen = tokenizer(every_text(), truncation=False).input_ids
        self.kept = torch.tensor(sorted({*ends_of(tokenizer), *(token for ids in seen for token in ids)}))

    def __call__(self, texts: list[str]) -> Tensor:
        """N x T, padded to the longest; numbers of `kept`."""
        return torch.searchsorted(self.kept, token_ids(self.tokenizer, texts))


def new_clip(vocabulary: int, ends: list[int]) -> CLIPModel:
    """Two transformers: 8 x 8 patches of 8 pixels, and words of a `vocabulary` of so many
    tokens; `ends` are those that begin, end and pad a text."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    text = {
        **shape,
        "num_hidden_layers": TEXT_LAYERS,
        "max_position_embeddings": CONTEXT,
        "vocab_size": vocabulary,
        **dict(zip(names, ends, strict=True)),
    }
    vision = {**shape, "num_hidden_layers": VISION_LAYERS, "image_size": SIDE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


class PatchHeads(nn.Module):
    """Names the subject and the colour of each patch; of use in training alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.subject = nn.Linear(width, 1 + len(SUBJECTS))
        self.colour = nn.Linear(width, 1 + len(COLOURS))

    def loss(self, hidden: Tensor, pictures: Pictures) -> Tensor:
        """Of a vision tower's last B x 65 x C."""
        patches = hidden[:, 1:].flatten(0, 1)
        subjects, colours = (
            torch.from_numpy(cells).flatten().long() for cells in (pictures.subjects, pictures.colours)
        )
        subject = F.cross_entropy(self.subject(patches), subjects, ignore_index=UNCLEAR)
        return subject + F.cross_entropy(self.colour(patches), colours, ignore_index=UNCLEAR)


def mentions_of(rows: np.ndarray) -> list[Mention]:
    """A row of `Pictures.mentions` as captions are made of it."""
    return [Mention(SUBJECTS[s], COLOUR_NAMES[c] if c != NONE else None) for s, c in rows if s != NONE]


def code(mentions: list[Mention]) -> np.ndarray:
    """For each subject, how many there are and which colour is said of them."""
    codes = np.zeros(len(SUBJECTS), dtype=np.int64)
    for mention in mentions:
        colour = 1 + COLOUR_NAMES.index(mention.colour) if mention.colour else 0
        at = SUBJECTS.index(mention.subject)
        codes[at] = (codes[at] // COLOUR_CODES + 1) * COLOUR_CODES + colour
    return codes


def fits(scenes: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """N x M bool: whether a text is true of a scene and names all of it; and whether it is
    neither that nor false, since it names a part of what is there, or a colour of what is
    in its own colours."""
    one, other = scenes[:, None], texts[None]
    there, named = one // COLOUR_CODES, other // COLOUR_CODES
    seen, said = one % COLOUR_CODES, other % COLOUR_CODES
    wrong = (said != seen) & (said > 0) & (seen > 0)
    unknown = (said > 0) & (seen == 0)
    possible = (named <= there).all(axis=-1) & ~wrong.any(axis=-1)
    doubtful = (named < there).any(axis=-1) | unknown.any(axis=-1)
    return possible & ~doubtful, possible & doubtful


def altered(mentions: list[Mention], rng: np.random.Generator) -> list[Mention]:
    """What is nearly true: another colour, another subject, one too many, or two colours
    exchanged, which few scenes allow and half of those get."""
    two_colours = {mention.colour for mention in mentions}
    if len(mentions) == 2 == len(two_colours) and None not in two_colours and rng.random() < 0.5:
        return [Mention(a.subject, b.colour) for a, b in zip(mentions, mentions[::-1], strict=True)]
    kind = rng.choice(["colour", "subject", "more"])
    changed = list(mentions)
    at = rng.integers(len(mentions))
    other = Mention(SUBJECTS[rng.integers(len(SUBJECTS))], mentions[at].colour)
    if kind == "colour" and mentions[at].colour:
        changed[at] = Mention(mentions[at].subject, COLOUR_NAMES[rng.integers(len(COLOURS))])
    elif kind == "more" and len(mentions) < MOST_STICKERS:
        changed.insert(rng.integers(len(mentions) + 1), other)
    else:
        changed[at] = other
    return changed


def said(mentions: list[Mention], background: str, rng: np.random.Generator) -> tuple[str, list[Mention]]:
    """Words for a scene, and what they say: colours may be left out."""
    draw = rng.random()
    mentions = [mentions[k] for k in rng.permutation(len(mentions))]
    if draw < SPOKEN:
        return spoken(mentions, background), mentions
    places = RULES["place_words"].get(background)
    place = places[rng.integers(len(places))] if places and rng.random() < RULES["place_named"] else None
    made = caption(mentions, place, rng)
    words = made.text.split()
    kept = [
        Mention(mention.subject, mention.colour if words[noun - 1] == mention.colour else None)
        for mention, noun in zip(mentions, made.words, strict=True)
    ]
    if draw < SPOKEN + TEMPLATED and " of " not in made.text:
        template = templates()[rng.integers(len(templates()))]
        return fill(template, made.text, "official" if rng.random() < 0.5 else "paper"), kept
    return made.text, kept


def words_for(pictures: Pictures, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Twice as many texts as pictures, true ones and then nearly true ones, and their codes."""
    true = [mentions_of(row) for row in pictures.mentions]
    backgrounds = [BACKGROUNDS[background] for background in pictures.backgrounds] * 2
    wanted = [*true, *(altered(mentions, rng) for mentions in true)]
    pairs = [said(mentions, place, rng) for mentions, place in zip(wanted, backgrounds, strict=True)]
    return [text for text, _ in pairs], np.stack([code(mentions) for _, mentions in pairs])


def contrastive_loss(logits: Tensor, true: Tensor, doubtful: Tensor) -> Tensor:
    """Cross-entropy of pictures N over texts M >= N, and of the first N texts over pictures.

    All texts that are true of a picture share its probability, doubtful ones stand aside.
    """
    logits = logits.masked_fill(doubtful, -1e4)
    n = len(logits)
    target = true.float()
    pictures = F.cross_entropy(logits, target / target.sum(dim=1, keepdim=True))
    target = target[:, :n].T
    return (pictures + F.cross_entropy(logits[:, :n].T, target / target.sum(dim=1, keepdim=True))) / 2


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """N x T, padded to the longest."""
    return tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids


def every_text() -> list[str]:
    """Texts that have all the words that a text may have."""
    spoken_places = [spoken([Mention("cat", None)], background) for background in BACKGROUNDS]
    return [*every_word(), *spoken_places, *templates()]


def export(clip: CLIPModel, tokens: Tokens, folder: Path) -> None:
    """Write model, tokenizer and image processor. The model gets CLIP's whole vocabulary
    back; tokens never seen are zeros, which cost nothing in a compressed package."""
    tokenizer = tokens.tokenizer
    weights = clip.state_dict()
    embeddings = torch.zeros(len(tokenizer), WIDTH)
    embeddings[tokens.kept] = weights[EMBEDDINGS]
    whole = new_clip(len(tokenizer), ends_of(tokenizer))
    whole.load_state_dict({**weights, EMBEDDINGS: embeddings})
    whole.half().save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    # As it was read: not with the padding of the last batch.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    CLIPProcessor(images, tokenizer).save_pretrained(folder)


def read_exported(clip: CLIPModel, folder: Path, tokens: Tokens) -> None:
    """What `export` wrote, with the vocabulary of training again."""
    weights = CLIPModel.from_pretrained(folder, dtype=torch.float32).state_dict()
    clip.load_state_dict({**weights, EMBEDDINGS: weights[EMBEDDINGS][tokens.kept]})


def plain(mentions: list[Mention]) -> str:
    """ "a red car and a cat"."""
    return " and ".join(f"a {m.colour} {m.subject}" if m.colour else f"a {m.subject}" for m in mentions)


def vectors(clip: CLIPModel, images: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
    """Unit vectors N x C of pictures or of texts."""
    if images is not None:
        features = clip.get_image_features(pixel_values=images)
    else:
        features = clip.get_text_features(input_ids=ids)
    return F.normalize(features.pooler_output, dim=-1)


@torch.no_grad()
def figures(clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures) -> dict[str, float]:
    """What the CLIP gets right on scenes whose truth is known.

    `caption of picture`, `picture of caption`: the best of all N is a true one. Of scenes
    with one sticker: `subject`, the best of the 24; `colour`, of the tinted, the best of
    the 11. Of scenes with two: `both above one`, both subjects' names come nearer than
    either alone; `both above absent`, each alone comes nearer than any that isn't there;
    `colours exchanged`, of two tinted ones, the right way comes nearer.
    """
    rng = np.random.default_rng(TEST_SEED)
    rows = [mentions_of(row) for row in pictures.mentions]
    n = len(rows)
    texts, codes = words_for(pictures, rng)
    true, _ = fits(np.stack([code(row) for row in rows]), codes[:n])
    images = vectors(clip, images=to_tensor(pictures.images))
    nearness = images @ vectors(clip, ids=token_ids(tokenizer, texts[:n])).T
    at = np.arange(n)

    @cache
    def vector(text: str) -> Tensor:
        return vectors(clip, ids=token_ids(tokenizer, [text]))[0]

    def ranked(row: int, options: list[list[Mention]]) -> list[int]:
        """The options from the nearest to a picture on; the same words around all of them."""
        texts = torch.stack([vector("a photo of " + plain(mentions)) for mentions in options])
        return (texts @ images[row]).argsort(descending=True).tolist()

    results: dict[str, list[bool]] = {
        "subject": [],
        "colour": [],
        "both above one": [],
        "both above absent": [],
        "colours exchanged": [],
    }
    names = [[Mention(subject, None)] for subject in SUBJECTS]
    for row, mentions in enumerate(rows):
        first, *others = mentions
        if not others:
            chosen, *_ = ranked(row, names)
            results["subject"].append(SUBJECTS[chosen] == first.subject)
            if first.colour:
                chosen, *_ = ranked(row, [[Mention(first.subject, colour)] for colour in COLOUR_NAMES])
                results["colour"].append(COLOUR_NAMES[chosen] == first.colour)
        elif len(others) == 1 and others[0].subject != first.subject:
            second = others[0]
            results["both above one"].append(ranked(row, [mentions, [first], [second]])[0] == 0)
            leading = {SUBJECTS[k] for k in ranked(row, names)[:2]}
            results["both above absent"].append(leading == {first.subject, second.subject})
            if first.colour and second.colour and first.colour != second.colour:
                exchanged = [Mention(first.subject, second.colour), Mention(second.subject, first.colour)]
                results["colours exchanged"].append(ranked(row, [mentions, exchanged])[0] == 0)
    return {
        "caption of picture": float(true[at, nearness.argmax(dim=1).numpy()].mean()),
        "picture of caption": float(true[nearness.argmax(dim=0).numpy(), at].mean()),
        **{name: float(np.mean(values)) for name, values in results.items()},
    }


def main() -> None:
    """Train, or go on with, the small CLIP; or measure it."""
    arguments = trainee_arguments(__doc__, steps=1500)
    use_one_thread()
    folder = arguments.runs / "clip"
    if arguments.measure:
        clip = CLIPModel.from_pretrained(folder / "model", dtype=torch.float32).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder / "model")
        measure(folder, partial(figures, clip, tokenizer), TEST_SCENES, arguments.init / "vae")
        return

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.init, subfolder="tokenizer", model_max_length=CONTEXT)
    tokens = Tokens(tokenizer)
    ends = torch.searchsorted(tokens.kept, torch.tensor(ends_of(tokenizer))).tolist()
    clip, heads = new_clip(len(tokens.kept), ends), PatchHeads(WIDTH)
    if arguments.weights:
        read_exported(clip, arguments.weights, tokens)
    embeddings = clip.text_model.embeddings.token_embedding.parameters()
    optimiser = Muon([*clip.parameters(), *heads.parameters()], lr=arguments.rate, sparse=embeddings)
    average = Average([clip], decay=0.99)
    vae = load_vae(arguments.init / "vae")
    stock = Stock(arguments.runs / "pictures", arguments.chunks, vae)

    def take_step(n: int) -> dict[str, float]:
        for group in optimiser.param_groups:
            group["lr"] = arguments.rate * warmup_cosine(n, arguments.steps, warmup=50)
        pictures, rng = stock.batch(n, arguments.batch), np.random.default_rng((SEED, n))
        texts, codes = words_for(pictures, rng)
        shown = np.stack([code(mentions_of(row)) for row in pictures.mentions])
        true, doubtful = (torch.from_numpy(answer) for answer in fits(shown, codes))
        images = softened(to_tensor(pictures.images), rng, blurs=BLURS)
        output = clip(pixel_values=images, input_ids=tokens(texts))
        contrast = contrastive_loss(output.logits_per_image, true, doubtful)
        patches = heads.loss(output.vision_model_output.last_hidden_state, pictures)
        optimiser.zero_grad(set_to_none=True)
        (contrast + PATCH_LOSS * patches).backward()
        optimiser.step()
        average.update()
        return {"contrast": contrast.item(), "patches": patches.item()}

    def on_save(_: int) -> None:
        average.swap()
        export(clip, tokens, folder / "model")
        average.swap()

    state = {"clip": clip, "heads": heads, "optimiser": optimiser, "average": average}
    train(folder, state, take_step, arguments.steps, on_save, weights=arguments.weights)


if __name__ == "__main__":
    main()

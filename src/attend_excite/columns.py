"""Subjects of parsed prompts -> columns of the attention maps, as tensors: one `Table` a table of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from attend_excite.guidance.nursing import Table
from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.schedule import Recipe
from attend_excite.subjects import Prompt, Stream

Positions = Sequence[Sequence[Sequence[int]]]
"""`[image][subject]` the positions of a subject's tokens in one table."""


def tables_of(
    prompts: Sequence[Prompt],
    streams: Sequence[Stream],
    recipe: Recipe,
    *,
    columns: Sequence[int] | None = None,
    shared: bool = False,
    first: Positions | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Table]:
    """The subjects of a batch in each of the model's tables of tokens.

    Args:
        prompts: one an image.
        streams: the tables of tokens that the model attends to.
        recipe: says which tokens are compared, where the table leaves that open.
        columns: which of all the text's tokens the maps have; None: all.
        shared: whether image and text share a softmax.
        first: the positions in the first table that are measured; None: all of each subject's.
        device: of the tensors.
        dtype: of the targets, float32 or wider.
    """
    tables = []
    for at, stream in enumerate(streams):
        kept = range(stream.start, stream.start + stream.width)
        if columns is not None:
            kept = [index for index, column in enumerate(columns) if column in kept]
        words = [prompt.words(at) if prompt.spans else (1, stream.width - 2) for prompt in prompts]
        # The authors leave the context's last position out, whatever is there; so do we.
        prompt_only = compares_prompt_only(recipe, stream, shared)
        ends = [last if prompt_only else stream.width - 2 for _, last in words]
        if len(kept) < stream.width and not prompt_only:
            # Padding is masked, and there are as many columns as the batch's longest prompt has.
            ends = [min(last + 1, stream.width - 2) for _, last in words]
        subjects = SubjectTokens.stack(
            positions=positions_of(prompts, at) if at or first is None else first,
            last=ends,
            first=[first for first, _ in words],
            target=[[group.target for group in prompt.groups] for prompt in prompts],
            negated=[[group.negated for group in prompt.groups] for prompt in prompts],
            attributes=[
                [
                    [each.further[at - 1] if at else each.positions for each in group.attributes]
                    for group in prompt.groups
                ]
                for prompt in prompts
            ],
            others=[prompt.others(at) if prompt.spans else () for prompt in prompts],
            device=device,
            dtype=dtype,
        )
        between = _between_chunks(prompts, stream, prompt_only)
        if between is not None:
            between = between.to(device)
        tables.append(Table(slice(kept[0], kept[-1] + 1), shared, subjects, between))
    # A subject of the other tables alone counts in the first one too: its losses are told there.
    everywhere = torch.stack([table.subjects.real for table in tables]).any(dim=0)
    return [replace(table, subjects=replace(table.subjects, real=everywhere)) for table in tables]


def _between_chunks(prompts: Sequence[Prompt], stream: Stream, words_alone: bool) -> torch.Tensor | None:
    """(B, tokens) what is no word between the words of a text of several chunks; None: there is nothing.

    A prompt of one chunk has as many as the longest text beside it, the negative prompt say. That are the
    chunks' first tokens, which draw most of the attention, and their last; where the words alone are
    compared, what fills the chunks up, too.
    """
    if not any(prompt.chunks for prompt in prompts) or stream.width <= stream.tokenizer.model_max_length:
        return None
    length = stream.tokenizer.model_max_length
    between = torch.zeros(len(prompts), stream.width, dtype=torch.bool)
    for at in range(stream.width):
        edge = at % length in (0, length - 1)
        for row, prompt in enumerate(prompts):
            of_text = at < len(prompt.spans) and prompt.spans[at] != (0, 0)
            between[row, at] = edge or (words_alone and not of_text)
    return between


def positions_of(prompts: Sequence[Prompt], table: int = 0) -> list[list[tuple[int, ...]]]:
    """`[image][subject]` the positions of all of a subject's tokens in a table; none where it is cut."""
    return [
        [group.further[table - 1] if table else group.positions for group in prompt.groups]
        for prompt in prompts
    ]


def compares_prompt_only(recipe: Recipe, stream: Stream, shared: bool) -> bool:
    """Whether attention is compared among the prompt's own tokens, without <eot> and padding."""
    if recipe.prompt_tokens_only is None or shared:
        return stream.prompt_tokens_only
    return recipe.prompt_tokens_only

"""The words of a prompt as chips: which of them are subjects, and how the model splits them into tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from itertools import islice, takewhile
from typing import Any

from attend_excite.app.limits import MAX_PROMPT, check_prompt
from attend_excite.nouns import WORD
from attend_excite.subjects import Prompt, Subject, label_of, parse
from attend_excite.turns import turn_of


@dataclass(frozen=True)
class Word:
    """One word of a prompt.

    Attributes:
        text: the word.
        name: the subject that it can be, "cat#2" for the second cat; "" where it can be none.
        pieces: as the model reads it, ("som", "brero"); empty behind the end of its context.
        chosen: whether it is a subject.
        negated: whether the picture is not to show it.
        target: the attention wanted, or for a negated one allowed, 0 to 1.
        clicked_in: the prompt in which the visitor has changed it: then it stays so while that prompt is
            edited; "": they have not.
        unread: whether the model has never read the word, and so cannot draw it.
    """

    text: str
    name: str
    pieces: tuple[str, ...]
    chosen: bool = False
    negated: bool = False
    target: float = 1.0
    clicked_in: str = ""
    unread: bool = False


def words_of(
    prompt: str,
    tokenizer: Any,
    subjects: Sequence[Subject] | None = None,
    earlier: Sequence[Word] = (),
    unread_of: Callable[[Sequence[int]], Set[int]] = lambda _: frozenset(),
) -> tuple[tuple[Word, ...], str]:
    """Look at a prompt.

    Args:
        prompt: as typed; [brackets] name its subjects.
        tokenizer: of the model.
        subjects: the chosen words, all others being left out on purpose; None: those in brackets, or the
            nouns.
        earlier: the words before the last edit.
        unread_of: which of some token ids the model has never read.

    Returns:
        The words, and a sentence on them, or "".

    Raises:
        ValueError: the prompt is too long, a bracket is not closed, or a subject isn't in the prompt.
    """
    check_prompt(prompt)
    if not prompt.strip():
        return (), "Type what the picture is to show."
    parsed, note = _parsed(prompt, tokenizer, subjects)
    kept = {
        word.name: word
        for word in earlier
        if word.name and word.clicked_in and _is_edited(word.clicked_in, parsed.text)
    }
    with turn_of(tokenizer):
        read = tokenizer(
            parsed.text, truncation=True, return_offsets_mapping=True, return_special_tokens_mask=True
        )
    ids = read["input_ids"]
    # Some tokenizers put a token before the text and behind it, others one of the two, or none.
    marked = zip(read["offset_mapping"], read["special_tokens_mask"], strict=True)
    spans = [(0, 0) if special else span for span, special in marked]
    strangers = unread_of(ids)
    words: list[Word] = []
    for match in WORD.finditer(parsed.text):
        text, (start, end) = match[0], match.span()
        positions = [at for at, (first, last) in enumerate(spans) if first < end and last > start]
        # Without the space that some tokenizers count among a word.
        pieces = tuple(parsed.text[max(spans[at][0], start) : min(spans[at][1], end)] for at in positions)
        name = label_of(text, start, parsed.text) if text[0].isalnum() and pieces else ""
        word = Word(
            text,
            name,
            pieces,
            clicked_in=parsed.text if name and subjects is not None else "",
            unread=bool(name) and any(ids[at] in strangers for at in positions),
        )
        for group in parsed.groups:
            if name and not set(positions).isdisjoint(group.positions):
                word = replace(word, chosen=True, negated=group.negated, target=group.target)
        words.append(_as_chosen(word, kept[name]) if name in kept else word)
    if strange := ", ".join(dict.fromkeys(f"“{word.text}”" for word in words if word.unread)):
        note = f"{note} The model has never read {strange}: it cannot draw that.".strip()
    if cut := " ".join(word.text for word in words if not word.pieces):
        note = f"The model reads {tokenizer.model_max_length} tokens: “{cut}” is cut."
    return tuple(words), note


def subjects_of(words: Sequence[Word]) -> tuple[Subject, ...]:
    """What the picture is to show, and what not."""
    return tuple(Subject(word.name, word.target, word.negated) for word in words if word.chosen)


def words_from(values: Any) -> tuple[Word, ...]:
    """The words that came back from the browser, none of them trusted.

    Raises:
        ValueError: they are no words.
    """
    try:
        return tuple(map(_word_from, islice(values["words"], MAX_PROMPT)))
    except (KeyError, OverflowError, TypeError, ValueError):
        raise ValueError("the chosen words cannot be read: load the page again") from None


def words_document(words: Sequence[Word], note: str, prompt: str = "") -> dict[str, Any]:
    """Plain data for the browser, which writes the prompt down with each click."""
    return {"words": [asdict(word) for word in words], "note": note, "prompt": prompt}


def _word_from(value: Mapping[str, Any]) -> Word:
    return Word(
        text=str(value["text"])[:MAX_PROMPT],
        name=str(value["name"])[:MAX_PROMPT],
        pieces=tuple(str(piece)[:MAX_PROMPT] for piece in islice(value["pieces"], MAX_PROMPT)),
        chosen=bool(value["chosen"]),
        negated=bool(value["negated"]),
        target=float(value["target"]),
        clicked_in=str(value["clicked_in"])[:MAX_PROMPT],
    )


def _as_chosen(word: Word, earlier: Word) -> Word:
    """The word with what the visitor has made of it, and with the tokens of the model that reads it now."""
    return replace(
        word,
        chosen=earlier.chosen,
        negated=earlier.negated,
        target=earlier.target,
        clicked_in=earlier.clicked_in,
    )


def _is_edited(before: str, now: str) -> bool:
    """Whether a prompt is still another one's, edited: at least half of that one stands unchanged before and
    after what is different."""
    start = _common(before, now)
    end = _common(before[start:][::-1], now[start:][::-1])
    return 2 * (start + end) >= len(before)


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _parsed(prompt: str, tokenizer: Any, subjects: Sequence[Subject] | None) -> tuple[Prompt, str]:
    if subjects is not None:
        return parse(prompt, tokenizer, subjects), ""
    try:
        return parse(prompt, tokenizer), ""
    except ValueError:
        # Without subjects only what is wrong with the prompt itself is left to be raised.
        return parse(prompt, tokenizer, ()), "No noun found: choose the words that the picture must show."

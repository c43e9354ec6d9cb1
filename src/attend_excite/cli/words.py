"""A prompt and its subjects as they are typed in a shell."""

from __future__ import annotations

from collections.abc import Sequence


def check_prompt(prompt: str | None, behind: Sequence[str]) -> None:
    """Refuse a prompt that stands without quotes, whose further words the shell takes for arguments, and one
    of bytes that are no text.

    Raises:
        ValueError: words stand behind the prompt, or it is no text.
    """
    check_text(prompt, "the prompt")
    if behind:
        words = " ".join([prompt or "", *behind]).strip()
        raise ValueError(f'put the prompt in quotes: "{words}"')


def check_text(text: str | None, what: str) -> None:
    """Refuse bytes that are no text.

    Raises:
        ValueError: they are none.
    """
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is no text in UTF-8: type it again") from None


def check_subjects(subjects: Sequence[str] | None, prompt: str) -> None:
    """Refuse several subjects in one option.

    Raises:
        ValueError: a subject has a comma in it, and the prompt doesn't say it so.
    """
    for subject in subjects or ():
        if "," in subject and subject not in prompt:
            each = " ".join(f'--subject "{part.strip()}"' for part in subject.split(",") if part.strip())
            raise ValueError(f"'{subject}' are several subjects, and an option names one: write {each}")

"""What Ctrl-C and a signal leave behind: nothing."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from torch import nn
from torch.utils.hooks import RemovableHandle

from attend_excite import Model, record
from attend_excite.cli.messages import end_tidily, failures_as_sentences
from attend_excite.models.model import frozen


class _Interrupted(nn.Linear):
    """Ctrl-C comes just when it is put back into training mode, as often as `left` says."""

    left = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and value and self.left:
            type(self).left -= 1
            raise KeyboardInterrupt
        super().__setattr__(name, value)


def test_a_second_ctrl_c_in_the_clean_up_leaves_nothing_changed() -> None:
    network = nn.Sequential(nn.Linear(1, 1), _Interrupted(1, 1), nn.Linear(1, 1))
    with suppress(KeyboardInterrupt), frozen(network):
        _Interrupted.left = 3
        raise KeyboardInterrupt
    assert _Interrupted.left == 0
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.fixture
def ctrl_c_in_clean_ups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C comes just before each of the first hooks goes, as often as the number in the list says."""
    left, remove = [0], RemovableHandle.remove

    def interrupted(handle: RemovableHandle) -> None:
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        remove(handle)

    monkeypatch.setattr(RemovableHandle, "remove", interrupted)
    return left


def test_ctrl_c_in_the_clean_up_leaves_no_hook(
    tiny: Model, same_model: Callable[[Model], Callable[[], None]], ctrl_c_in_clean_ups: list[int]
) -> None:
    check = same_model(tiny)
    for attended in (record(tiny.network, tiny.places()), tiny.family.attend_to_sets(1, 32)):
        with suppress(KeyboardInterrupt), attended:
            ctrl_c_in_clean_ups[0] = 3
            raise KeyboardInterrupt
        assert ctrl_c_in_clean_ups[0] == 0
        check()


@pytest.fixture
def signals() -> Iterator[None]:
    ends = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in ends]
    yield
    for number, handler in zip(ends, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_program_tidily(tmp_path: Path, number: signal.Signals) -> None:
    end_tidily()
    with (
        pytest.raises(typer.Exit) as ended,
        failures_as_sentences(),
        tempfile.TemporaryDirectory(dir=tmp_path),
    ):
        signal.raise_signal(number)
    assert ended.value.exit_code == 128 + number
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("signals")
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_tidily()
    signal.raise_signal(signal.SIGHUP)

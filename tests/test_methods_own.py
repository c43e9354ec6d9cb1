"""Objectives and methods that a user writes: as good as ours, found by where they lie, told from others."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from attend_excite import AttendAndExcite, Model, Recipe
from attend_excite.cli import app
from attend_excite.guidance.objective import (
    SubjectTokens,
    most_neglected,
    subject_attention,
    subject_losses,
    token_probabilities,
)
from attend_excite.guidance.objectives import Need, Objective, Recorded
from attend_excite.metadata import read_origin
from attend_excite.methods.own import code_digest, find_method

PROMPT = "a cat and a frog"
METHODS = """
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from attend_excite import AttendAndExcite

@dataclass(frozen=True)
class Faded:
    share: float = 0.5
    name, title = "faded", "Fading guidance"
    uses_subjects, attends_to_prompt = False, True

    @contextmanager
    def attach(self, run):
        run.guidance_scale *= self.share
        yield lambda latents, step: (latents, run.predict_guided(latents, step))

def largest(recorded, subjects):
    return -recorded.cross.amax(dim=(1, 2, 3))

stronger = Faded(0.9)
nursed = AttendAndExcite("official", objective=largest)
on_faded = AttendAndExcite("official", base=Faded())
METHODS = {}

def needy(a, b, c):
    return Faded(a)

def faded():
    return Faded()

def weighted(weight, recorded, subjects):
    return -weight * recorded.cross.amax(dim=(1, 2, 3))

light, heavy = (AttendAndExcite("official", objective=partial(weighted, weight)) for weight in (1, 50))
nameless = AttendAndExcite("official", objective=lambda found, subjects: -found.cross.amax(dim=(1, 2, 3)))
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with a module of methods, in which the program is started."""
    (tmp_path / "my_methods.py").write_text(METHODS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_methods", None)


def _papers(recipe: Recipe) -> Objective:
    """Equation 2, written by a user."""

    def loss(recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        probabilities = token_probabilities(recorded.cross, subjects.last, recipe.temperature)
        return most_neglected(
            subject_losses(subject_attention(probabilities, subjects, recipe.sigma), subjects)
        )

    return loss


def test_the_papers_objective_written_again_draws_the_same(tiny: Model) -> None:
    drawn = [
        tiny.generate([PROMPT, "a dog"], method=method, steps=3, decode=False, progress=False).latents
        for method in (AttendAndExcite(), AttendAndExcite(objective=_papers(tiny.recipe)))
    ]
    assert torch.equal(*drawn)


def test_the_latents_move_down_an_objective_of_ones_own(tiny: Model) -> None:
    """Away from the words: the attention to <sot> is not what the paper's objective looks at."""

    def away(recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        return 1 - recorded.cross[..., 0].mean(dim=(1, 2))

    recipe = Recipe.from_dict({"base": "official", "step_size": 5.0, "thresholds": [[0.0, 1.0]]})
    result = tiny.generate(
        PROMPT, method=AttendAndExcite(recipe, objective=away), steps=2, decode=False, progress=False
    )
    losses = [update.loss for update in result.trace[0].steps[0].updates]
    assert len(losses) == recipe.max_refinements + 1
    assert all(later < earlier for earlier, later in pairwise(losses))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda found, _: found.cross.mean(),
        lambda found, _: found.cross.detach().mean(dim=(1, 2, 3)),
        lambda found, _: 1.0,
    ],
)
def test_an_objective_that_gives_no_loss_is_refused(tiny: Model, wrong: Objective) -> None:
    with pytest.raises(ValueError, match="it must give one loss an image"):
        tiny.generate(PROMPT, method=AttendAndExcite(objective=wrong), steps=1, progress=False)


@pytest.mark.parametrize("needs", [(), ("self-attention",), ("step-before",)])
def test_an_objective_is_given_what_it_needs_and_no_more(tiny: Model, needs: tuple[Need, ...]) -> None:
    """At each of three guided steps; at the first there is no step before."""
    given: list[Recorded] = []

    class Mine:
        name = "mine"

        def __init__(self) -> None:
            self.needs = frozenset(needs)

        def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
            given.append(recorded)
            return recorded.cross[..., 2].mean(dim=(1, 2))

    recipe = Recipe.from_dict({"base": "official", "thresholds": []})
    method = AttendAndExcite(recipe, objective=Mine())
    tiny.generate([PROMPT, "a dog"], method=method, steps=6, decode=False, progress=False)
    before = [recorded.before for recorded in given]
    assert [each is not None for each in before] == (
        [False, True, True] if "step-before" in needs else [False] * 3
    )
    for now, then in zip(given, before[1:], strict=False):
        if then is not None:
            assert torch.equal(then.cross, now.cross.detach())
            assert not then.cross.requires_grad
    for recorded in given:
        assert recorded.cross.shape == (2, 4, 4, 77)
        assert (recorded.self_attention is not None) == ("self-attention" in needs)
        if recorded.self_attention is not None:
            rows = recorded.self_attention.sum(dim=-1)
            torch.testing.assert_close(rows, torch.ones(2, 16, dtype=torch.float64))
            assert recorded.self_attention.requires_grad


def test_the_documented_objective_and_method_run(tiny: Model) -> None:
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    samples = text[text.index("## An objective of your own") :].split("```python\n")
    written: dict[str, Any] = {"AttendAndExcite": AttendAndExcite}
    for sample in samples[1:]:
        code = sample.split("```")[0]
        if code.startswith(("import", "from", "@", "def")):
            exec(code, written)
    methods = AttendAndExcite(objective=written["total_variation"]), written["TurnedDown"]()
    drawn = [
        tiny.generate(PROMPT, method=each, steps=2, decode=False, progress=False).latents for each in methods
    ]
    assert all(latents.isfinite().all() for latents in drawn)
    assert not torch.equal(*drawn)


def test_a_method_is_found_where_it_lies(mine: Path) -> None:
    (mine / "broken.py").write_text("from attend_excite import AttendAndExcite\nAttendAndExcite('offical')")
    assert find_method("my_methods:Faded").name == "faded"
    assert find_method("my_methods:faded") == find_method("my_methods:Faded")
    assert find_method("my_methods:stronger") != find_method("my_methods:Faded")
    assert find_method("composable").name == "composable"
    for name, message in {
        "magic": "or one of your own as MODULE:NAME",
        "my_methods:Gone": "the module my_methods has no Gone",
        "my_methods:": "has no name behind the colon",
        "my_methods:largest": r"is an objective .*: write `mine = AttendAndExcite\(objective=largest",
        "my_methods:needy": "cannot be made without arguments",
        "my_methods:METHODS": "is no method: it has no attach, ",
        "nowhere.to_be:Found": "no module 'nowhere.to_be' here or installed",
        "broken:Faded": "the module 'broken' cannot be imported: unknown recipe 'offical'",
        ":Faded": "no module ''",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_method(name)


def test_the_program_draws_with_methods_of_ones_own(mine: Path, tiny_folder: Path) -> None:
    out = ["--out", str(mine / "out"), "--model", str(tiny_folder), "--steps", "2", "--json"]
    names = ("Faded", "stronger", "nursed", "on_faded", "light", "heavy")
    for name in names:
        result = CliRunner().invoke(app, ["generate", PROMPT, "--method", f"my_methods:{name}", *out])
        assert result.exit_code == 0, result.output
    pictures = list((mine / "out").iterdir())
    assert len(pictures) == len(names)
    # No picture makes a program run code that it names.
    for picture in pictures:
        with pytest.raises(ValueError, match=r"somebody's own, .*: name what drew it with --method"):
            read_origin(picture)
    for name in names:
        again = ["generate", "--from", str(pictures[0]), "--method", f"my_methods:{name}", *out]
        assert CliRunner().invoke(app, again).exit_code == 0
    assert len(list((mine / "out").iterdir())) == len(names)
    explained = ["explain", str(pictures[0]), "--out", str(mine / "why")]
    assert "name what drew it with --method" in " ".join(CliRunner().invoke(app, explained).output.split())
    result = CliRunner().invoke(app, [*explained, "--method", "my_methods:light"])
    assert result.exit_code == 0, result.output
    assert (mine / "why" / "maps.png").is_file()
    nameless = CliRunner().invoke(app, ["generate", PROMPT, "--method", "my_methods:nameless", *out])
    assert "cannot be written down so that no other is taken for it" in nameless.output


def test_the_benchmark_tells_systems_of_ones_own_apart(mine: Path, tiny_folder: Path) -> None:
    jobs = pytest.importorskip("attend_excite.benchmark.jobs", reason="the benchmark needs pyarrow")
    names = [f"my_methods:{name}" for name in ("Faded", "stronger", "nursed", "on_faded")]
    official = Recipe.named("official")
    systems = jobs.systems_named([*names, "attend-excite official"], official)
    numbers = [json.dumps(system.numbers, sort_keys=True) for system in systems]
    assert len(set(numbers)) == 5
    assert systems[0].numbers == {"name": "my_methods:Faded", "share": 0.5, "code": systems[0].code}
    assert systems[2].numbers["objective"] == "my_methods:largest"
    assert systems[3].numbers["base"] == {"name": "my_methods:Faded", "share": 0.5}

    run = ["--model", str(tiny_folder), "--per-subset", "1", "--seeds", "2", "--steps", "2", "--out", "run"]
    chosen = [part for name in names for part in ("--system", name)]
    result = CliRunner().invoke(app, ["benchmark", "run", *run, *chosen])
    assert result.exit_code == 0, result.output
    assert len(list(Path("run").rglob("*.png"))) == 3 * 2 * 4
    # Another method beside them changes none of them.
    (mine / "my_methods.py").write_text("import math\n" + METHODS + "also = Faded(0.7)\n")
    sys.modules.pop("my_methods")
    result = CliRunner().invoke(app, ["benchmark", "run", *run, *chosen, "--system", "my_methods:also"])
    assert result.exit_code == 0, result.output
    # Pictures by a method as it was aren't mixed with those by what it became.
    (mine / "my_methods.py").write_text(METHODS.replace("-recorded.cross", "-2 * recorded.cross"))
    sys.modules.pop("my_methods")
    again = CliRunner().invoke(app, ["benchmark", "run", *run, *chosen])
    assert again.exit_code != 0
    assert "with other numbers or code: choose another --out" in again.output


def test_a_methods_code_is_its_own_and_what_it_uses(mine: Path) -> None:
    (mine / "helpers.py").write_text("FACTOR = 2\n\ndef doubled(x):\n    return FACTOR * x\n\nOTHER = 1\n")
    uses = (
        "import math\nfrom helpers import doubled as twice\nBASE = 3\n\n@staticmethod\n"
        "def mine(maps, subjects):\n    return twice(maps) + BASE\n\nmine.share = 1\n"
    )

    def digest(text: str = uses, helpers: str | None = None) -> str | None:
        (mine / "own.py").write_text(text)
        if helpers:
            (mine / "helpers.py").write_text(helpers)
        for name in ("own", "helpers"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return code_digest("own:mine")

    helpers = (mine / "helpers.py").read_text()
    first = digest()
    for alike in (
        f"{uses}\nelse_where = BASE + 1\n\ndef other(maps, subjects):\n    return mine(maps, subjects)\n",
        f'"""Words."""\n\n# more\n{uses}',
        f"{uses}if __name__ == '__main__':\n    print(mine)\n",
    ):
        assert digest(alike) == first
    assert digest(uses, helpers.replace("OTHER = 1", "OTHER = 2")) == first
    for change in (
        ("BASE = 3", "BASE = 4"),
        ("mine.share = 1", "mine.share = 2"),
        ("@staticmethod", "@classmethod"),
        ("+ BASE", "- BASE"),
    ):
        assert digest(uses.replace(*change)) != first
    assert digest(f"{uses}for name in (1, 2):\n    BASE += name\n") != first
    assert digest(uses, helpers.replace("FACTOR = 2", "FACTOR = 3")) != first
    assert code_digest("composable") is None

"""The benchmark's prompts, its runs, and what is left of them when they are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attend_excite import Model, load
from attend_excite.cli import app

pytest.importorskip("pyarrow", reason="the benchmark needs pyarrow")

from attend_excite.benchmark import claims, store
from attend_excite.benchmark.claims import Claims
from attend_excite.benchmark.estimate import estimate
from attend_excite.benchmark.jobs import Batch, conditions_of, plan, sweep, systems_named
from attend_excite.benchmark.names import titles
from attend_excite.benchmark.prompts import (
    BenchmarkPrompt,
    paper_prompts,
    read_prompts,
    sample,
    with_subjects,
)
from attend_excite.benchmark.run import Here, Queue, begin, broken_images, draw
from attend_excite.guidance.schedule import Recipe
from attend_excite.metadata import as_plain_data
from attend_excite.methods import AttendAndExcite
from attend_excite.nouns import find_nouns

WORDS = json.loads((Path(store.__file__).parents[1] / "data" / "benchmark.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    """The tiny model as a run finds it."""
    return load(tiny_folder, device="cpu")


@pytest.fixture
def batches(model: Model) -> list[Batch]:
    """Three prompts, three seeds, three systems: 27 images in two sizes of batches."""
    prompts = sample(paper_prompts(), per_subset=1)
    systems = systems_named(["attend-excite no-refinement", "stable-diffusion", "composable"], model.recipe)
    return plan(prompts, range(3), systems, conditions_of(model, 2, 7.5), batch_size=2)


@pytest.fixture
def quick_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run's claims are free after half a second."""
    monkeypatch.setattr(claims, "HEARTBEAT", 0.05)
    monkeypatch.setattr(claims, "SILENCE", 0.5)


def test_the_papers_prompts() -> None:
    prompts = paper_prompts()
    assert Counter(prompt.subset for prompt in prompts) == {
        "animals": 66,
        "animal and object": 144,
        "objects": 66,
    }
    pairs = [prompt.subjects for prompt in prompts]
    assert pairs[:66] == list(combinations(WORDS["animals"], 2))
    assert pairs[66:210] == list(product(WORDS["animals"], WORDS["objects"]))
    assert pairs[210:] == list(combinations(WORDS["objects"], 2))
    worn = [prompt.text for prompt in prompts if " with " in prompt.text]
    assert len(worn) == 36
    assert not any(colour in text.split() for text in worn for colour in WORDS["colours"])
    for prompt in prompts[210:]:
        first, second = prompt.subjects or ()
        assert [word for word in prompt.text.split() if word not in WORDS["colours"]] == (
            ["a", first, "and", "a", second]
        )
    # The authors' list writes "an" before the elephant, and nowhere else.
    texts = " ".join(prompt.text for prompt in prompts)
    assert texts.count("an elephant") == texts.count("elephant") == 23
    assert texts.split().count("an") == 23
    assert "a orange" in texts
    assert "a glasses" in texts
    # The nouns found are the subjects that the list gives.
    assert all(tuple(noun.text for noun in find_nouns(p.text)) == p.subjects for p in prompts)
    assert len({prompt.text for prompt in prompts}) == 276
    assert prompts == paper_prompts()
    assert {p.text for p in prompts[:66]} == {p.text for p in paper_prompts(seed=1)[:66]}
    assert prompts[210:] != paper_prompts(seed=1)[210:]


def test_prompt_files(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "lines").write_text("a cat and a frog\n\na [red car]\na cat and a frog\n", encoding="utf-8")
    (tmp_path / "official.txt").write_text(
        '{"animals": ["a cat and a dog"], "animals_objects": ["a cat with a bow"], "objects": []}',
        encoding="utf-8",
    )
    (tmp_path / "table.csv").write_text(
        'prompt,subset,subjects\n"a cat, a yellow bowl",mine,cat; yellow bowl\na dog,,\n', encoding="utf-8"
    )
    lines = [with_subjects(prompt, tokenizer) for prompt in read_prompts(tmp_path / "lines")]
    assert lines == [
        BenchmarkPrompt("a cat and a frog", "", ("cat", "frog")),
        BenchmarkPrompt("a red car", "", ("red car",)),
    ]
    assert read_prompts(tmp_path / "official.txt") == [
        BenchmarkPrompt("a cat and a dog", "animals"),
        BenchmarkPrompt("a cat with a bow", "animal and object"),
    ]
    assert read_prompts(tmp_path / "table.csv") == [
        BenchmarkPrompt("a cat, a yellow bowl", "mine", ("cat", "yellow bowl")),
        BenchmarkPrompt("a dog"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n", "there is no prompt"),
        ("other.json", '{"base": "official"}', "'base' in .* must be a list of prompts"),
        ("broken.json", "{", "the file of prompts .* is not JSON"),
        ("deep.json", '{"a": ' + "[" * 100_000, "nested too deep"),
        ("long.json", '{"a": ' + "9" * 5000 + "}", "a number in it is too long"),
        ("bad.jsonl", '{"prompt": "a cat"}\n{"tag": "x"}', 'line 2 .* must be an object with a "prompt"'),
        ("bad.jsonl", '{"prompt": "a cat", "include": [{"count": 2}]}', 'must be an object with a "class"'),
        (
            "bad.jsonl",
            '{"prompt": "a cat", "include": [{"class": "cat", "position": ["left of", 3]}]}',
            'the position of "cat" is from the thing 3',
        ),
        ("list.json", '["a cat and a dog"]', "must be an object"),
        ("table.csv", "text\na cat\n", "must have 'prompt'"),
        ("table.csv", "prompt\na cat, a dog and a frog\n", "line 2 .* quote its commas"),
        ("table.csv", "prompt,subset\na cat,all\n", "a subset .* is called 'all'"),
    ],
)
def test_a_bad_prompt_file_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_literal_brackets_are_drawn_and_judged_as_words(model: Model, tmp_path: Path, tokenizer: Any) -> None:
    prompt = with_subjects(BenchmarkPrompt(r"a [cat] beside a \[red\] car"), tokenizer)
    assert prompt == BenchmarkPrompt(r"a cat beside a \[red\] car", "", ("cat",))
    systems = systems_named(["stable-diffusion"], model.recipe)
    batches = plan([prompt], range(1), systems, conditions_of(model, 1, 7.5), batch_size=1)
    begin(tmp_path, batches[0][0].conditions, [prompt], range(1), systems)
    _draw_all(model, batches, tmp_path)
    (row,) = store.read_rows(tmp_path).to_pylist()
    assert (row["error"], row["prompt"]) == (None, "a cat beside a [red] car")
    other = replace(prompt, subjects=("car",))
    with pytest.raises(ValueError, match="with other subjects"):
        begin(tmp_path, batches[0][0].conditions, [other], range(1), systems)


def test_every_job_has_a_name_of_its_own_that_stays(model: Model, batches: list[Batch]) -> None:
    jobs = [job for batch in batches for job in batch]
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) == 27
    assert [len(batch) for batch in batches] == [2, 2, 2, 1, 1, 1] * 3
    for batch in batches:
        assert len({job.system.name for job in batch}) == 1
    # Not what the batches are, but what changes the image, is in the name.
    prompts, conditions = list(dict.fromkeys(job.prompt for job in jobs)), jobs[0].conditions
    systems = list(dict.fromkeys(job.system for job in jobs))

    def names_with(steps: int, ablation: str) -> set[str]:
        chosen = [*systems_named([ablation], model.recipe), *systems[1:]]
        again = plan(prompts, range(3), chosen, conditions_of(model, steps, 7.5), batch_size=8)
        return {job.name for batch in again for job in batch}

    assert conditions.revision is not None
    assert names_with(2, "attend-excite no-refinement") == set(names)
    assert len(names_with(2, "attend-excite bare") & set(names)) == 18
    assert not names_with(3, "attend-excite no-refinement") & set(names)
    other_maps = replace(model, attention_downsampling=2 * model.attention_downsampling)
    assert conditions_of(other_maps, 2, 7.5).revision != conditions.revision


def test_a_model_in_one_file_is_told_by_what_is_in_it(model: Model, tmp_path: Path) -> None:
    first, same, other = (tmp_path / f"{name}.safetensors" for name in ("first", "same", "other"))
    for file, content in ((first, b"a"), (same, b"a"), (other, b"b")):
        file.write_bytes(content)
    found = [conditions_of(replace(model, name=str(file)), 2, 7.5).revision for file in (first, same, other)]
    assert found[0] is not None
    assert (found[0] == found[1], found[0] == found[2]) == (True, False)


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(
    model: Model, batches: list[Batch], tmp_path: Path, quick_claims: None
) -> None:
    _draw_all(model, batches, tmp_path / "undisturbed")
    killed = tmp_path / "killed"
    for more in (1, 4):
        before = len(list(killed.glob("rows/*")))
        with _process(_draw_all, model, batches, killed) as process:
            _wait_for(lambda so_far=before + more: len(list(killed.glob("rows/*"))) >= so_far)
            os.kill(process.pid, signal.SIGKILL)
    assert 0 < store.read_rows(killed).num_rows < 27
    _draw_all(model, batches, killed)
    _assert_same(killed, tmp_path / "undisturbed")


def test_runs_in_one_folder_share_the_jobs(
    model: Model, batches: list[Batch], tmp_path: Path, quick_claims: None
) -> None:
    with _process(_draw_all, model, batches, tmp_path), _process(_draw_all, model, batches, tmp_path):
        pass
    rows_written = sum(store.parquet.ParquetFile(path).metadata.num_rows for path in tmp_path.glob("rows/*"))
    assert rows_written == store.read_rows(tmp_path).num_rows == 27
    assert list(tmp_path.glob("claims/*")) == []


def test_a_claim_is_one_runs_until_it_is_released_or_the_run_is_dead(
    tmp_path: Path, quick_claims: None
) -> None:
    def claim_and_hang() -> None:
        with Claims(tmp_path) as theirs:
            assert theirs.take("ab")
            time.sleep(60)

    with Claims(tmp_path) as ours:
        with _process(claim_and_hang) as process:
            _wait_for(lambda: (tmp_path / "claims" / "ab.0").exists())
            assert not ours.take("ab")
            time.sleep(2 * claims.SILENCE)
            assert not ours.take("ab")
            os.kill(process.pid, signal.SIGKILL)
        _wait_for(lambda: ours.take("ab"))
        with Claims(tmp_path) as others:
            assert not others.take("ab")
            ours.release("ab")
            assert others.take("ab")


def test_runs_that_begin_at_once_are_both_written_down(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store.write_settings

    def slowly(run: Path, settings: Any) -> None:
        time.sleep(0.5)
        write(run, settings)

    monkeypatch.setattr(store, "write_settings", slowly)

    def start(name: str) -> None:
        begin(
            tmp_path,
            conditions_of(model, 2, 7.5),
            paper_prompts()[:1],
            [0],
            systems_named([name], model.recipe),
        )

    with _process(start, "structure"), _process(start, "composable"):
        pass
    assert set(store.read_settings(tmp_path)["systems"]) == {"structure", "composable"}
    assert list(tmp_path.glob("claims/*")) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds Ray's processes in Linux's /proc")
def test_ray_goes_on_without_a_worker_and_without_its_driver(
    model: Model,
    batches: list[Batch],
    tiny_folder: Path,
    tmp_path: Path,
    quick_claims: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    # Sums in another order differ in their last digit, and a pixel now and then: as many threads as here.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    killed = tmp_path / "killed"

    def draw_with_ray() -> None:
        from attend_excite.benchmark.ray_executor import ray_workers

        options = {"device": "cpu", "dtype": None, "workers": 1, "address": None}
        with ray_workers(str(tiny_folder), **options) as executor, Claims(killed) as held:
            for _ in executor.draw(Queue(killed, batches, held)):
                pass

    def rows_there() -> int:
        return len(list(killed.glob("rows/*.parquet")))

    with _process(draw_with_ray) as driver:
        _wait_for(lambda: rows_there() > 0, seconds=300)
        (worker,) = [pid for pid in _descendants(driver.pid) if _command(pid).startswith("ray::_Worker")]
        os.kill(worker, signal.SIGKILL)
        so_far = rows_there()
        _wait_for(lambda: rows_there() > so_far, seconds=300)
        left = _descendants(driver.pid)
        os.kill(driver.pid, signal.SIGKILL)
    # Ray's own agents would notice in a minute or so.
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert rows_there() < len(batches)
    with _process(draw_with_ray):
        pass
    _draw_all(model, batches, tmp_path / "undisturbed")
    _assert_same(killed, tmp_path / "undisturbed")


def test_ray_goes_on_without_a_machine_of_the_cluster(
    batches: list[Batch], tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")

    def draw_on_two_machines() -> None:
        from ray.cluster_utils import Cluster

        from attend_excite.benchmark.ray_executor import ray_workers

        # The dashboard's agents would only take time to start.
        machine = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=machine)
        other = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        try:
            options = {"device": "cpu", "dtype": None, "workers": 2, "address": cluster.address}
            with ray_workers(str(tiny_folder), **options) as executor, Claims(tmp_path) as held:
                for drawn, _ in enumerate(executor.draw(Queue(tmp_path, batches, held))):
                    if drawn == 0:
                        cluster.remove_node(other, allow_graceful=False)
        finally:
            cluster.shutdown()

    with _process(draw_on_two_machines):
        pass
    rows = store.read_rows(tmp_path).to_pylist()
    assert len(rows) == sum(map(len, batches))
    assert all(row["error"] is None for row in rows)


def test_a_prompt_that_fails_spoils_no_other(model: Model, tmp_path: Path) -> None:
    prompts = [BenchmarkPrompt("a cat and a frog"), BenchmarkPrompt("a cat"), BenchmarkPrompt("quickly")]
    systems = systems_named(["composable", "attend-excite no-refinement"], model.recipe)
    batches = plan(prompts, range(2), systems, conditions_of(model, 1, 7.5), batch_size=8)
    _draw_all(model, batches, tmp_path)
    rows = store.read_rows(tmp_path).to_pylist()
    errors = {(row["system"], row["prompt"]): row["error"] for row in rows}
    assert len(rows) == 12
    assert errors["composable", "a cat and a frog"] is None
    assert "cannot be split" in errors["composable", "a cat"]
    assert errors["attend-excite no-refinement", "a cat"] is None
    assert "no noun" in errors["attend-excite no-refinement", "quickly"]
    assert all((row["image"] is None) == (row["error"] is not None) for row in rows)
    with Claims(tmp_path) as held:
        queue = Queue(tmp_path, batches, held)
        left = [job for work in iter(queue.take, None) for job in work.wanted]
    # Done is what has its image: those that failed are tried again.
    assert {(job.system.name, job.prompt.text) for job in left} == {
        key for key, error in errors.items() if error is not None
    }


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "the run's folder is empty"),
        ("https://example.invalid/run", "is a web address, where nothing can be written"),
        ("nope://run", "is no path, and no URL that is known here"),
    ],
)
def test_a_run_that_can_be_nowhere_is_refused_before_a_model_is_loaded(out: str, message: str) -> None:
    for command in (["run", "--out", out, "--model", "nowhere/at-all"], ["score", out], ["report", out]):
        told = CliRunner().invoke(app, ["benchmark", *command])
        assert told.exit_code == 2
        assert message in " ".join(told.stderr.split())


def test_rows_count_passes_and_updates(model: Model) -> None:
    (prompt,) = [prompt for prompt in paper_prompts() if prompt.text == "a cat and a frog"]
    names = ["attend-excite no-refinement", "stable-diffusion", "composable", "stable-diffusion best_of=3"]
    systems = systems_named(names, model.recipe)
    found = {}
    for batch in plan([prompt], [0], systems, conditions_of(model, 4, 7.5), batch_size=1):
        calls: list[int] = []
        handle = model.network.register_forward_pre_hook(
            lambda module, args, kwargs, calls=calls: calls.append(len((args or (kwargs["sample"],))[0])),
            with_kwargs=True,
        )
        ((row, _),) = draw(model, batch)
        handle.remove()
        assert row["unet_passes"] == sum(calls)
        found[row["system"]] = row["unet_passes"], row["updates"]
    # Half of four steps is altered, with a guidance pass each.
    assert found == {
        "attend-excite no-refinement": (10, 2),
        "stable-diffusion": (8, 0),
        "composable": (12, 0),
        "stable-diffusion best_of=3": (11, 0),
    }


def test_the_number_of_noises_is_part_of_a_systems_name(model: Model) -> None:
    names = ["stable-diffusion best_of=3", "attend-excite bare best_of=2", "attend-excite best_of=2 sigma=0"]
    plain, bare, smooth = systems_named(names, model.recipe)
    assert [plain.best_of, bare.best_of, smooth.best_of] == [3, 2, 2]
    assert bare.method == systems_named(["attend-excite bare"], model.recipe)[0].method
    assert smooth.method.recipe.sigma == 0
    (once,) = systems_named(["stable-diffusion"], model.recipe)
    chosen_by = {"chosen_by": as_plain_data(replace(model.recipe, summary=""))}
    assert plain.numbers == once.numbers | {"best_of": 3} | chosen_by
    assert list(titles(names, "stickers").values()) == [
        "stickers, plain, best of 3",
        "Attend-and-Excite, bare best of 2",
        "Attend-and-Excite, best of 2 sigma 0",
    ]
    for name in (
        "composable best_of=2",
        "stable-diffusion best_of=0",
        "stable-diffusion best_of=2 best_of=3",
    ):
        with pytest.raises(ValueError, match=r"best_of is given once|by which to compare noises"):
            systems_named([name], model.recipe)


def test_a_folder_holds_images_of_one_kind(model: Model, tmp_path: Path) -> None:
    (system,) = systems_named(["structure"], model.recipe)
    prompts = paper_prompts()[:2]
    begin(tmp_path, conditions_of(model, 2, 7.5), prompts[:1], range(2), [system])
    begin(tmp_path, conditions_of(model, 2, 7.5), prompts, range(3), [system])
    settings = store.read_settings(tmp_path)
    assert settings["seeds"] == [0, 1, 2]
    assert list(settings["systems"]) == ["structure"]
    assert settings["prompts"] == {
        "a cat and a dog": {"subset": "animals", "subjects": ["cat", "dog"]},
        "a cat and a bird": {"subset": "animals", "subjects": ["cat", "bird"]},
    }
    # What has no image yet may change: a prompt whose subjects had to be named, say.
    begin(tmp_path, conditions_of(model, 2, 7.5), [replace(prompts[1], subjects=None)], range(2), [system])
    begin(tmp_path, conditions_of(model, 2, 7.5), prompts, range(2), [system])
    row = {"job": "1", "prompt": prompts[0].text, "system": "attend-excite", "image": "1.png"}
    store.write_rows(tmp_path, [row])
    with pytest.raises(ValueError, match="steps 2, not 3"):
        begin(tmp_path, conditions_of(model, 3, 7.5), prompts, range(2), [system])
    other = replace(prompts[0], subjects=("cat",))
    with pytest.raises(ValueError, match="images of 'a cat and a dog' with other subjects"):
        begin(tmp_path, conditions_of(model, 2, 7.5), [other], range(2), [system])
    with pytest.raises(ValueError, match="'a cat and a dog' is given twice"):
        begin(tmp_path / "new", conditions_of(model, 2, 7.5), [prompts[0], other], range(2), [system])

    ours = systems_named(["attend-excite"], Recipe.named("official"))
    begin(tmp_path, conditions_of(model, 2, 7.5), prompts, range(3), ours)
    begin(tmp_path, conditions_of(model, 2, 7.5), prompts, range(3), ours)
    changed = systems_named(["attend-excite"], Recipe.named("bare", Recipe.named("official")))
    with pytest.raises(ValueError, match="images of 'attend-excite' with other numbers"):
        begin(tmp_path, conditions_of(model, 2, 7.5), prompts, range(3), changed)
    for content, message in (("{", "cannot be read"), ('{"systems": []}', "older version")):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            begin(tmp_path, conditions_of(model, 2, 7.5), prompts, range(3), ours)


def test_two_systems_with_the_same_numbers_have_their_own_images(model: Model, tmp_path: Path) -> None:
    systems = systems_named(["attend-excite", "attend-excite official"], Recipe.named("official"))
    assert systems[0].method == systems[1].method
    batches = plan(sample(paper_prompts(), 1)[:1], range(1), systems, conditions_of(model, 2, 7.5), 8)
    _draw_all(model, batches, tmp_path)
    rows = store.read_rows(tmp_path).to_pylist()
    assert {row["system"] for row in rows} == {"attend-excite", "attend-excite official"}
    first, second = (store.read_image(tmp_path, row["image"]).tobytes() for row in rows)
    assert first == second
    for row in rows:
        assert row["device"] == "cpu"
        assert f"torch {version('torch')}" in row["versions"]


def test_systems_with_recipes_of_ones_own(tmp_path: Path) -> None:
    official = Recipe.named("official")
    (tmp_path / "mine.json").write_text('{"base": "recommended", "step_size": 3}')
    file = str(tmp_path / "mine.json")
    names = [
        f"attend-excite {file}",
        f"attend-excite {file} sigma=0",
        "attend-excite paper sigma=0 decay=square-root",
        *sweep("step_size=5, 10"),
    ]
    systems = systems_named(names, official)
    assert [system.name for system in systems] == [
        "attend-excite mine.json",
        "attend-excite mine.json sigma=0",
        "attend-excite paper sigma=0 decay=square-root",
        "attend-excite step_size=5",
        "attend-excite step_size=10",
    ]
    recipes = [system.method.recipe for system in systems if isinstance(system.method, AttendAndExcite)]
    assert recipes == [
        replace(official, step_size=3),
        replace(official, step_size=3, sigma=0),
        replace(Recipe.named("paper"), sigma=0, decay="square-root"),
        replace(official, step_size=5),
        replace(official, step_size=10),
    ]
    (other,) = systems_named(["syngen step_size=7"], official)
    assert (other.method.name, other.method.recipe.step_size) == ("syngen", 7)  # type: ignore[attr-defined]
    assert sweep("bare altered=0.25,1") == ["attend-excite bare altered=0.25", "attend-excite bare altered=1"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.json").write_text('{"base": "recommended"}')
    for wrong, message in (
        ([f"attend-excite {file}", f"attend-excite {tmp_path / 'other' / 'mine.json'}"], "rename one"),
        (["attend-excite steps=5"], "unknown in a recipe: steps"),
        (["attend-excite step_size=high"], "step_size is 'high'"),
        (["attend-excite nowhere.json"], "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            systems_named(wrong, official)
    for wrong in ("step_size", "=1,2", "step_size=5", "step_size=1,,2"):
        with pytest.raises(ValueError, match="is no sweep"):
            sweep(wrong)


def test_the_estimate_is_what_a_run_costs(model: Model, batches: list[Batch], tmp_path: Path) -> None:
    expected = {each.system: each for each in estimate(tmp_path, model, batches)}
    assert not list(tmp_path.iterdir())
    _draw_all(model, batches, tmp_path)
    rows = store.read_rows(tmp_path).to_pylist()
    for name, each in expected.items():
        mine = [row for row in rows if row["system"] == name]
        assert each.images == len(mine) == 9
        assert each.unet_passes == sum(row["unet_passes"] for row in mine)
        size = sum(store.image_size(tmp_path, row["image"]) for row in mine)
        assert each.size == pytest.approx(size, rel=0.1)
    assert all(each.images == 0 for each in estimate(tmp_path, model, batches))


def test_the_newest_row_of_a_job_counts_anywhere_that_fsspec_reaches() -> None:
    run = f"memory://{os.getpid()}"
    store.write_rows(run, [{"job": "a", "error": "no"}, {"job": "b", "seed": 1}])
    store.write_rows(run, [{"job": "a", "seed": 2}])
    assert [(row["job"], row["seed"], row["error"]) for row in store.read_rows(run).to_pylist()] == [
        ("a", 2, None),
        ("b", 1, None),
    ]
    store.write_scores(run, "clip", [{"job": "a", "score": 0.5}, {"job": "b", "score": None}])
    store.write_scores(run, "clip", [{"job": "b", "score": 0.25}])
    assert store.read_scores(run, "clip").to_pylist() == [
        {"job": "a", "score": 0.5},
        {"job": "b", "score": 0.25},
    ]


def test_what_the_disk_lost_is_made_again_in_its_batch(
    model: Model, batches: list[Batch], tmp_path: Path
) -> None:
    whole, lossy = tmp_path / "whole", tmp_path / "lossy"
    for folder in (whole, lossy):
        _draw_all(model, batches, folder)
    files = {path: path.stat().st_mtime_ns for path in lossy.rglob("*.png")}
    gone, empty, cut = (lossy / store.image_path(batches[at][-1].name) for at in (0, 1, 2))
    gone.unlink()
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-40])
    assert set(broken_images(lossy)) == {str(path.relative_to(lossy)) for path in (empty, cut)}

    # Planned otherwise: what was drawn before is drawn again as it was all the same.
    systems = list(dict.fromkeys(batch[0].system for batch in batches))
    prompts = list(dict.fromkeys(job.prompt for batch in batches for job in batch))
    _draw_all(model, plan(prompts, range(3), systems, batches[0][0].conditions, batch_size=1), lossy)
    _assert_same(lossy, whole, but=["attempt"])
    again = {row["job"] for row in store.read_rows(lossy).to_pylist() if row["attempt"]}
    assert again == {path.stem for path in (gone, empty, cut)}
    assert {path.stem for path in files if path.stat().st_mtime_ns != files[path]} == again

    rows = lossy / "rows" / f"{store.name_of([job.name for job in batches[4]])}.parquet"
    rows.write_bytes(b"")
    with pytest.warns(UserWarning, match=f"{rows.name}.*cannot be read: it is set aside"):
        store.set_aside_broken(lossy, "rows")
    assert store.read_rows(lossy).num_rows == 27 - len(batches[4])
    _draw_all(model, batches, lossy)
    _assert_same(lossy, whole, but=["attempt"])


def test_what_is_done_does_not_depend_on_clocks(
    model: Model, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = batches[3]
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: 4e9)
        store.write_rows(tmp_path, [{"job": job.name, "error": "no memory"}])
    _draw_all(model, batches[3:4], tmp_path)
    (row,) = store.read_rows(tmp_path).to_pylist()
    assert (row["error"], row["attempt"]) == (None, 1)
    with Claims(tmp_path) as held:
        assert not Queue(tmp_path, batches[3:4], held)
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: 4e9)
        store.write_scores(tmp_path, "clip", [{"job": job.name, "full": 0.1, "attempt": 0}, {"job": "other"}])
    store.write_scores(tmp_path, "clip", [{"job": job.name, "full": 0.2, "attempt": 1}])
    assert {row["job"]: row["full"] for row in store.read_scores(tmp_path, "clip").to_pylist()} == {
        job.name: 0.2,
        "other": None,
    }


def test_the_program_draws_tells_and_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [*("--model", str(tiny_folder), "--out", str(out), "--per-subset", "1", "--steps", "1")]
    options += ["--seeds", "2", "--system", "structure", "--system", "reweight", "--device", "cpu"]
    dry = _run(*options, "--dry-run")
    assert "6" in dry.stdout
    assert not out.exists()
    assert "structure" in _run(*options).stdout
    assert store.read_rows(out).num_rows == 12
    again = _run(*options, "--seeds", "3")
    assert "12 of 18 images are there" in again.stderr
    assert store.read_rows(out).num_rows == 18
    assert "12 of 12 images are there" in _run(*options, "--first-seed", "1").stderr
    assert "seeds are 0 to" in _run(*options, "--first-seed", "-1", status=2).stderr
    assert "reweight has no recipes" in _run(*options, "--system", "reweight bare", status=2).stderr
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat and a frog\nquickly\n")
    mixed = _run(*options, "--prompts", str(prompts), "--system", "attend-excite no-refinement", status=1)
    assert "'quickly' by attend-excite no-refinement, 2 images: no noun found" in mixed.stderr


def _run(*arguments: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["benchmark", "run", *arguments])
    assert result.exit_code == status, result.output
    return result


def _draw_all(model: Model, batches: Sequence[Batch], folder: Path) -> None:
    with Claims(folder) as held:
        for _ in Here(model).draw(Queue(folder, batches, held)):
            pass


@contextmanager
def _process(target: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """A function in a forked process, waited for at the end of the block."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    try:
        yield process
        process.join()
    finally:
        process.kill()


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _command(pid: int) -> str:
    """The command line of a process; empty: it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _descendants(pid: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # "12 (name) S 11 ...": the name may have blanks and brackets.
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def _assert_same(run: Path, other: Path, but: Sequence[str] = ()) -> None:
    """The same rows apart from timings and some columns, and the same pixels."""
    rows, others = (
        store.read_rows(folder).drop_columns(["seconds", *but]).to_pylist() for folder in (run, other)
    )
    assert rows == others
    for row in rows:
        pixels, others_pixels = (store.read_image(folder, row["image"]).tobytes() for folder in (run, other))
        assert pixels == others_pixels

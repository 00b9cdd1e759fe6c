"""`medaug replay`: every bundle's images come out of their lineage again, byte for byte; what would not is refused or reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guided_world import new_classifier_run
from PIL import Image
from random_run import World
from replay_worlds import WORLDS, Made, dagan_run, generate
from typer.testing import CliRunner

from medaug import assets, storage
from medaug.cli.options import app
from medaug.cohort import Cohort, write_cohort
from medaug.errors import ConfigError, DataError, MedaugError
from medaug.generation.dagan import DaganSampler
from medaug.generation.replay import choose_cases, replay_settings
from medaug.quality.gate import run_gate
from medaug.replay_record import FILE_NAME, Generation, carry_record, read_record, refuse_code


@pytest.fixture(scope="module")
def cohort(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    torch.set_num_threads(1)
    return make_cohort(tmp_path_factory.mktemp("real") / "cohort", per_class=10)


@pytest.fixture(scope="module")
def made(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The cheapest one."""
    return WORLDS["dagan"](cohort, tmp_path_factory.mktemp("dagan"))


@pytest.fixture
def mine(made: Made, tmp_path: Path) -> Made:
    """A copy to spoil."""
    shutil.copytree(made.folder, tmp_path / "mine")
    return replace(made, folder=tmp_path / "mine")


def replay(made: Made, *which: str, run: Path | None = None, cohort: Path | None = None) -> tuple[int, dict[str, Any]]:
    """Exit code and summary of `medaug replay`; a refusal is raised."""
    places = ["--synthetic", str(made.folder), "--cohort", str(cohort or made.world.cohort.root)]
    places += ["--run", str(run or made.world.run)] if made.has_run else []
    result = CliRunner().invoke(app, ["replay", *which, *places, *made.more, "--json"])
    if isinstance(result.exception, MedaugError):
        raise result.exception
    return result.exit_code, json.loads(result.stdout)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- the law ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_random_images_of_every_bundle_come_out_again(name: str, cohort: Cohort, tmp_path: Path) -> None:
    made = WORLDS[name](cohort, tmp_path)
    before, lineages = files(made.folder), {case.id: case.lineage or {} for case in made.cohort.training}
    code, summary = replay(made, "--random", "4", "--seed", "3")
    assert (code, summary["cases"], summary["identical"]) == (0, 4, 4)
    for row in summary["rows"]:
        assert row["sha256_on_disk"] == row["sha256_replayed"] == row["sha256_in_lineage"] == lineages[row["id"]]["image_sha256"]
        assert row["largest_difference"] == 0 and row["made_on"]["threads"] == 1
    assert len({row["sha256_replayed"] for row in summary["rows"]}) == 4
    assert files(made.folder) == before
    sizes = [len(batch.cases) for entry in read_record(made.folder).values() for batch in entry.batches]
    assert max(sizes) > 1
    assert str(tmp_path) not in before[FILE_NAME].decode()


def test_accepted_images_come_out_again(made: Made, tmp_path: Path) -> None:
    accepted = run_gate(made.folder, Path(str(made.world.cohort.root)), tmp_path / "accepted", checks=("usable",)).accepted
    few = accepted.with_cases(training=accepted.training[::2])  # their neighbours in the batch are not in the cohort
    write_cohort(few, tmp_path / "accepted")
    code, summary = replay(replace(made, folder=tmp_path / "accepted"), *(case.id for case in few.training))
    assert (code, summary["identical"]) == (0, len(few.training)) and len(few.training) > 2


def test_images_of_a_plan_that_grew_come_out_of_the_batch_they_were_made_in(cohort: Cohort, tmp_path: Path) -> None:
    world = dagan_run(cohort, tmp_path / "run")
    for counts, size in (([3, 0, 0], 4), ([6, 0, 0], 4), ([7, 2, 0], 3)):
        generate(world, tmp_path / "s", "dagan", counts=counts, generation_batch_size=size)
    made = Made(tmp_path / "s", world)
    (entry,) = read_record(made.folder).values()
    assert [(len(batch.cases), len(batch.made)) for batch in entry.batches] == [(3, 3), (4, 1), (2, 2), (1, 1), (2, 2)]
    assert replay(made, "--random", "99")[1]["identical"] == 9
    generate(world, tmp_path / "s", "dagan", counts=[1, 0, 0])
    assert replay(made, "--random", "99")[1]["rows"][0]["identical"]


def test_the_record_of_a_killed_run_is_that_of_a_whole_one(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = DaganSampler.__call__, 0

    def dies(self: DaganSampler, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(DaganSampler, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        generate(made.world, tmp_path / "killed", "dagan")
    next((tmp_path / "killed" / "images").glob("*.png")).unlink()  # and one image of its first batch is lost
    generate(made.world, tmp_path / "killed", "dagan")
    record = (tmp_path / "killed" / FILE_NAME).read_bytes()
    assert record == (made.folder / FILE_NAME).read_bytes()
    generate(made.world, tmp_path / "killed", "dagan")
    assert (tmp_path / "killed" / FILE_NAME).read_bytes() == record


# --- differences ------------------------------------------------------------------------------------------------------


def test_a_changed_pixel_is_reported(mine: Made, tmp_path: Path) -> None:
    changed, other = mine.cohort.training[0], mine.cohort.training[1]
    path = mine.folder / changed.image
    true = path.read_bytes()
    pixels = np.asarray(Image.open(path)).astype(np.uint16)
    pixels[3, 4] = pixels[3, 4] + 7 if pixels[3, 4] < 60000 else pixels[3, 4] - 7
    Image.fromarray(pixels).save(path)
    code, summary = replay(mine, changed.id, other.id, "--out", str(tmp_path / "kept"))
    rows = {row["id"]: row for row in summary["rows"]}
    assert code == 3 and summary["identical"] == 1 and rows[other.id]["identical"]
    row = rows[changed.id]
    assert row["largest_difference"] == pytest.approx(7 / 65535, abs=1e-7)
    assert row["sha256_on_disk"] == storage.sha256_file(path) != row["sha256_replayed"] == row["sha256_in_lineage"]
    assert (tmp_path / "kept" / f"{changed.id}.png").read_bytes() == true
    path.write_bytes(b"no image")
    assert replay(mine, changed.id)[1]["rows"][0]["largest_difference"] is None


def test_people_are_told_what_differs(mine: Made) -> None:
    case = mine.cohort.training[0]
    (mine.folder / case.image).write_bytes((mine.folder / mine.cohort.training[1].image).read_bytes())
    places = ["--synthetic", str(mine.folder), "--cohort", str(mine.world.cohort.root), "--run", str(mine.world.run)]
    result = CliRunner().invoke(app, ["replay", case.id, *places])
    assert result.exit_code == 3
    assert f"{case.id}: NOT identical" in result.stdout and "the file is not the one that was made" in result.stdout
    assert "0 of 1 image(s) identical" in result.stdout


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_other_weights_are_refused(made: Made, cohort: Cohort, tmp_path: Path) -> None:
    other = dagan_run(cohort, tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="replay-other-weights") as caught:
        replay(made, "--random", "1", run=other.run)
    assert caught.value.exit_code == 2
    shutil.copytree(made.world.run, tmp_path / "changed")
    (tmp_path / "changed" / "model.safetensors").write_bytes((other.run / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="weights-changed"):
        replay(made, "--random", "1", run=tmp_path / "changed")


def test_a_run_is_asked_for_where_one_made_the_images(made: Made) -> None:
    with pytest.raises(ConfigError, match="run-not-given.*--run"):
        replay(replace(made, has_run=False), "--random", "1")


def test_another_classifier_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    made = WORLDS["uncertainty_guidance"](cohort, tmp_path)
    new_classifier_run(cohort, tmp_path / "classifier", seed=5)
    with pytest.raises(ConfigError, match="replay-other-settings.*classifiers"):
        replay(made, "--random", "1", "--set", f"classifier_dirs=[{tmp_path / 'classifier'}]")


def test_another_cohort_is_refused(made: Made, cohort: Cohort, tmp_path: Path) -> None:
    shutil.copytree(str(cohort.root), tmp_path / "fewer")
    fewer = write_cohort(cohort.with_cases(test=cohort.test[1:]), tmp_path / "fewer")
    with pytest.raises(ConfigError, match="replay-other-config"):
        replay(made, "--random", "1", cohort=fewer.root)


@pytest.mark.parametrize(
    ("name", "kept", "code"),
    [
        ("autoguidance", (), "setting-unknown.*run_dir"),
        ("disturbance, finished stage 1", (), "disturb-source"),
        ("stable_diffusion", (), "model-missing"),
    ],
)
def test_folders_that_no_record_names_are_asked_for(
    name: str, kept: tuple[str, ...], code: str, cohort: Cohort, tmp_path: Path
) -> None:
    made = WORLDS[name](cohort, tmp_path)
    with pytest.raises(ConfigError, match=code):
        replay(replace(made, more=kept), "--random", "1")


def test_images_without_a_record_are_refused(mine: Made) -> None:
    case = mine.cohort.training[0]
    path = mine.folder / FILE_NAME
    content = json.loads(path.read_text())
    (entry,) = content["generations"].values()
    for batch in entry["batches"]:
        batch["made"] = [name for name in batch["made"] if name != case.id]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"replay-not-recorded.*{case.id}"):
        replay(mine, case.id)
    assert replay(mine, mine.cohort.training[1].id)[0] == 0
    path.unlink()
    with pytest.raises(DataError, match="replay-not-recorded") as caught:
        replay(mine, case.id)
    assert caught.value.exit_code == 3


def test_an_older_folder_that_goes_on_records_what_is_new(mine: Made) -> None:
    (mine.folder / FILE_NAME).unlink()
    new = {case.id for case in generate(mine.world, mine.folder, "dagan", counts=[5, 3, 4]).training}
    known = {name for entry in read_record(mine.folder).values() for name in entry.batch_of()}
    assert len(known) == 2 and known < new
    assert replay(mine, *known)[1]["identical"] == 2


@pytest.mark.parametrize(
    "value", ["$open('/nowhere')", "@network", "%run", {"_target_": "os.getcwd"}, {"a": [["$1"]]}, {"+a": 1}]
)
def test_nothing_in_a_record_is_evaluated(value: Any) -> None:
    with pytest.raises(ValueError, match="evaluates"):
        refuse_code(value)
    for knobs in ({"sampler_settings": value}, {"$x": 1}):
        with pytest.raises(DataError, match="replay-record-malformed"):
            replay_settings(Generation("dagan", None, knobs), "cpu")
    plain = {"a": [1, 2.5, None, True, "karras"], "b": {}}
    assert replay_settings(Generation("dagan", None, {"target_label": plain}), "cpu")["target_label"] == plain


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="replay-device.*xpu.*cpu"):
        replay_settings(Generation("dagan", None, {}), "xpu")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry.update(format=2),
        lambda entry: next(iter(entry["generations"].values())).pop("batches"),
        lambda entry: next(iter(entry["generations"].values())).update(knobs=[]),
        lambda entry: next(iter(entry["generations"].values()))["batches"][0]["machine"].update(threads=0),
        lambda entry: next(iter(entry["generations"].values()))["batches"][0].update(made=["unknown"]),
        lambda entry: next(iter(entry["generations"].values()))["batches"][0]["cases"][0].__setitem__(1, 2),
        lambda entry: next(iter(entry["generations"].values()))["batches"][0]["cases"][0].__setitem__(2, "nobody"),
    ],
)
def test_a_spoilt_record_is_refused(mine: Made, spoil: Callable[[Any], Any]) -> None:
    content = json.loads((mine.folder / FILE_NAME).read_text())
    spoil(content)
    (mine.folder / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(DataError, match="replay-record-malformed"):
        replay(mine, "--random", "99")


def test_a_bundle_of_the_users_own_has_to_be_named(mine: Made, tmp_path: Path) -> None:
    content = json.loads((mine.folder / FILE_NAME).read_text())
    assets.copy_bundle("dagan", tmp_path / "my_method")
    for entry in content["generations"].values():
        entry["bundle"] = str(tmp_path / "my_method")
    (mine.folder / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="replay-bundle"):
        replay(mine, "--random", "1")
    assert replay(mine, "--random", "1", "--bundle", str(tmp_path / "my_method"))[0] == 0


def test_which_cases(made: Made) -> None:
    cohort = made.cohort
    name = cohort.training[0].id
    assert [case.id for case in choose_cases(cohort, [name, name])] == [name]
    drawn = [[case.id for case in choose_cases(cohort, [], 3, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 3
    for ids, count in (([], None), ([name], 2), ([], 0)):
        with pytest.raises(ConfigError, match="replay-which"):
            choose_cases(cohort, ids, count)
    with pytest.raises(DataError, match="replay-case-unknown.*nobody"):
        choose_cases(cohort, ["nobody"])


def test_nothing_is_kept_in_the_synthetic_folder(made: Made) -> None:
    for out in (made.folder, made.folder / "kept"):
        with pytest.raises(ConfigError, match="out-is-input"):
            replay(made, "--random", "1", "--out", str(out))


# --- the record -------------------------------------------------------------------------------------------------------


def test_records_of_several_folders_become_one(made: Made, cohort: Cohort, tmp_path: Path) -> None:
    world = World(cohort, made.world.record, made.world.run)
    for seed in (1, 2):
        generate(world, tmp_path / str(seed), "dagan", seed=seed)
    carry_record([tmp_path / "1", tmp_path / "2", tmp_path / "1", None, tmp_path / "nowhere"], tmp_path / "all")
    both = {**read_record(tmp_path / "1"), **read_record(tmp_path / "2")}
    assert read_record(tmp_path / "all") == both and len(both) == 2
    parts = [made.folder, tmp_path / "all"]
    carry_record(parts, tmp_path / "all")
    assert len(read_record(tmp_path / "all")) == 3
    carry_record([tmp_path / "nowhere"], tmp_path / "all")  # images made elsewhere took their place
    assert not (tmp_path / "all" / FILE_NAME).exists()


@pytest.mark.parametrize(
    "knobs",
    [
        {"session#_target_": "builtins.dict"},
        {"sampler": {}},
        {"guidance_settings": {"autoguidance": {"run_dir": "elsewhere"}}},
        {"stable_diffusion_settings": {"model_dir": "elsewhere"}},
    ],
)
def test_a_record_sets_what_samplers_name_and_no_folder(knobs: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="replay-record-malformed"):
        replay_settings(Generation("dagan", None, knobs, ()), "cpu")


def test_a_cohort_without_images_has_nothing_to_replay(cohort: Cohort) -> None:
    with pytest.raises(DataError, match="replay-nothing"):
        choose_cases(cohort.with_cases(training=[], validation=[], test=[]), [], 3)


def test_out_in_the_folder_that_is_checked_is_refused_however_it_is_named(mine: Made) -> None:
    with pytest.raises(MedaugError, match="out-is-input"):
        replay(replace(mine, more=(*mine.more, "--out", str(mine.folder / "images"))), "--random", "1")
    renamed = replace(mine, folder=mine.folder / "cohort.json", more=(*mine.more, "--out", str(mine.folder / "images")))
    with pytest.raises(MedaugError, match="out-is-input"):
        replay(renamed, "--random", "1")

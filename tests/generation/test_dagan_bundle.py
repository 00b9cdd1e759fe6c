"""The bundle `dagan` through its own configs: resume, choice of the generator, images, lineage, refusals, profiles."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from medaug import assets, storage
from medaug.cohort import Case, Cohort, check_against
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.generation.dagan import DaganSampler, ValidationKid
from medaug.generation.generate import PlanBatches
from medaug.generation.plan import variation_plan
from medaug.io.raster import read_unit_png
from medaug.training.checkpoint import FILE_NAME
from medaug.training.dagan import DaganIteration, load_generator, new_generator
from medaug.training.run_folder import RUN_FILE, WEIGHTS_FILE, RunRecord, read_run
from medaug.workflow import STAGES, load_config, read_yaml, run_stage

QUIET = {"tracking": {"enabled": False}, "device_name": "cpu"}
GENERATOR = {"channels": [4, 8], "patch": 2, "num_res_blocks": 1, "latent_dim": 3, "latent_scales": 1}
TINY = QUIET | {
    "dagan_settings#generator": GENERATOR,
    "dagan_settings#critic": {"channels": [4, 8], "patch": 2, "num_res_blocks": 1},
    "batch_size": 4,
    "epoch_length": 4,
    "max_epochs": 4,
    "critic_steps": 1,
    "preview_every": 0,
}


@pytest.fixture(scope="module")
def cohort(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    torch.set_num_threads(1)
    return make_cohort(tmp_path_factory.mktemp("cohort"), per_class=10)


@pytest.fixture(scope="module")
def run(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dagan") / "run"
    train(cohort, folder)
    return folder


def train(cohort: Cohort, out: Path, profile: str | None = None, **overrides: Any) -> RunRecord:
    """`medaug train dagan` in this process."""
    paths = {"dataset_dir": str(cohort.root), "output_dir": str(out)}
    record: RunRecord = run_stage("dagan", "training", profile, paths | TINY | overrides)
    return record


def generate(cohort: Cohort, run: Path, out: Path, **overrides: Any) -> Cohort:
    """`medaug generate dagan` in this process."""
    paths = {"dataset_dir": str(cohort.root), "run_dir": str(run), "output_dir": str(out)}
    made: Cohort = run_stage("dagan", "generating", None, paths | QUIET | {"generation_batch_size": 4} | overrides)
    return made


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


# --- the kill law -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iteration", [3, 6, 13])
def test_an_interrupted_run_ends_with_the_same_bytes(
    cohort: Cohort, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iteration: int
) -> None:
    step = DaganIteration.__call__

    def failing(self: DaganIteration, engine: Any, batch: dict[str, Any]) -> dict[str, float]:
        if int(batch["iteration"][0]) == iteration:
            raise KeyboardInterrupt
        return step(self, engine, batch)

    with monkeypatch.context() as patch:
        patch.setattr(DaganIteration, "__call__", failing)
        with pytest.raises(KeyboardInterrupt):
            train(cohort, tmp_path / "killed")
    assert not (tmp_path / "killed" / RUN_FILE).exists()
    assert train(cohort, tmp_path / "killed") == read_run(run)
    assert (tmp_path / "killed" / WEIGHTS_FILE).read_bytes() == (run / WEIGHTS_FILE).read_bytes()


def test_a_killed_process_ends_with_the_same_bytes(cohort: Cohort, run: Path, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with suppress(BaseException):  # the child must never reach pytest
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            torch.set_num_threads(1)
            train(cohort, tmp_path / "killed")
        os._exit(0)
    limit = time.monotonic() + 120
    while time.monotonic() < limit and not (tmp_path / "killed" / "checkpoint" / FILE_NAME).is_file():
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL  # not finished before
    assert train(cohort, tmp_path / "killed") == read_run(run)
    assert storage.sha256_file(tmp_path / "killed" / WEIGHTS_FILE) == read_run(run).weights_sha256


def test_workers_and_sheets_change_nothing(cohort: Cohort, run: Path, tmp_path: Path) -> None:
    record = train(cohort, tmp_path / "run", num_workers=1, preview_every=3, checkpoint_every=0)
    assert record.weights_sha256 == read_run(run).weights_sha256
    sheet = read_unit_png(tmp_path / "run" / "samples" / "epoch_0003.png")
    assert sheet.shape == (3 * 2 * 16, 8 * 16)  # per class training images and what is made of them


# --- the choice of the generator --------------------------------------------------------------------------------------


def test_the_generator_with_the_best_figure_is_kept(cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, torch.Tensor]] = []
    measure = ValidationKid.__call__

    def watched(self: ValidationKid, network: Any) -> dict[str, float | None]:
        figures = measure(self, network)
        seen.append((figures["validation_kid"] or 0.0, network.out.weight.clone()))
        return figures

    monkeypatch.setattr(ValidationKid, "__call__", watched)
    record = train(cohort, tmp_path / "run", **{"dagan_settings#learning_rate": 0.02})
    kept = load_generator(tmp_path / "run", record).out.weight
    assert len(seen) == 4 and len({figure for figure, _ in seen}) == 4
    best = min(range(4), key=lambda epoch: seen[epoch][0])
    assert [torch.equal(kept, weight) for _, weight in seen] == [epoch == best for epoch in range(4)]


def test_without_a_look_at_validation_the_last_generator_is_kept(cohort: Cohort, tmp_path: Path) -> None:
    blind = cohort.with_cases(validation=())
    network = new_generator(GENERATOR, cohort, 0).eval()
    assert ValidationKid(blind)(network) == {"validation_kid": None}
    record = train(cohort, tmp_path / "run", measure_every=0, **{"dagan_settings#ema_decay": 0.0})
    from safetensors.torch import load_file

    last = load_file(tmp_path / "run" / "checkpoint" / FILE_NAME)["network/out.weight"]
    assert torch.equal(load_generator(tmp_path / "run", record).out.weight, last)


def test_the_figure_tells_real_images_from_noise_and_has_no_seed_of_validation(cohort: Cohort) -> None:
    network = new_generator(GENERATOR, cohort, 0).eval()
    measure = ValidationKid(cohort)
    first = measure(network)["validation_kid"]
    assert first is not None and measure(network)["validation_kid"] == first

    class Copies(torch.nn.Module):
        latent_dim = 3

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return x

    copies = measure(Copies())["validation_kid"]  # type: ignore[arg-type]
    assert copies is not None and copies < first
    real, seeds = measure._pairs()
    assert [case.label for case in real] == [case.label for case in seeds]
    assert {case.id for case in seeds} <= {case.id for case in cohort.training}
    assert {case.id for case in real} == {case.id for case in cohort.validation}


# --- generation -------------------------------------------------------------------------------------------------------


def test_images_have_the_label_and_the_lineage_of_their_seed(cohort: Cohort, run: Path, tmp_path: Path) -> None:
    made, record = generate(cohort, run, tmp_path / "s", synthetic_per_real=2, seed=3), read_run(run)
    check_against(made, cohort)
    training = {case.id: case for case in cohort.training}
    assert len(made.training) == 2 * len(training)
    for case in made.training:
        lineage = case.lineage or {}
        seed_image = training[lineage["reference"]]
        assert (case.group, case.label, lineage["intended_label"]) == (seed_image.group, seed_image.label, seed_image.label)
        assert (lineage["bundle"], lineage["seed"], lineage["sampler"]) == ("dagan", 3, {"seed": 3})
        assert lineage["variation"] in (0, 1) and lineage["noise"] == {"latent": "standard normal"}
        assert lineage["fit_on"] == record.fit_on and lineage["weights_sha256"] == record.weights_sha256
    assert len(set(images(tmp_path / "s").values())) == len(made.training)


def test_an_image_depends_on_its_own_key_alone(cohort: Cohort, run: Path) -> None:
    record = read_run(run)
    network, sampler = load_generator(run, record, cohort.classes), DaganSampler(seed=1)
    plan = variation_plan(cohort, record, 1, counts=[3, 2, 2])

    def made(batch_size: int) -> dict[str, torch.Tensor]:
        return {
            name: image
            for batch in PlanBatches(cohort, plan, batch_size)
            for name, image in zip(batch["id"], sampler(batch, network), strict=True)
        }

    one, many = made(1), made(8)
    for name, image in one.items():
        torch.testing.assert_close(image, many[name], atol=1e-5, rtol=0)


def test_a_killed_generation_goes_on_with_the_same_bytes(cohort: Cohort, run: Path, tmp_path: Path) -> None:
    whole = generate(cohort, run, tmp_path / "whole", counts=[6, 2, 2])
    made = images(tmp_path / "whole")
    for name in sorted(made)[::3]:
        (tmp_path / "whole" / "images" / name).unlink()
    (tmp_path / "whole" / "cohort.json").unlink()
    assert generate(cohort, run, tmp_path / "whole", counts=[6, 2, 2]).content_sha256 == whole.content_sha256
    assert images(tmp_path / "whole") == made


def test_evaluation_writes_its_figures(cohort: Cohort, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medaug.generation import evaluate
    from medaug.training.classifier import ClassifierRecipe

    trained = evaluate.train_filter
    recipe = ClassifierRecipe(num_steps=4, evaluate_every=2)
    monkeypatch.setattr(evaluate, "train_filter", lambda *args, **more: trained(*args, **more, recipe=recipe))
    paths = {"dataset_dir": str(cohort.root), "run_dir": str(run), "output_dir": str(tmp_path / "e")}
    found = run_stage("dagan", "evaluating", None, paths | QUIET | {"samples_per_class": 2})
    assert found["samples"] == 6 and 0 <= found["label_agreement"] <= 1


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_held_out_seed_image_is_refused(cohort: Cohort, run: Path, tmp_path: Path, split: str) -> None:
    held_out: Case = getattr(cohort, split)[0]
    with pytest.raises(LeakageError, match="reference-held-out") as caught:
        generate(cohort, run, tmp_path / "s", seeds=[held_out.id], counts=[1, 0, 0])
    assert caught.value.exit_code == 4
    assert not (tmp_path / "s").exists()


def test_a_run_of_another_cohort_or_method_is_refused(
    cohort: Cohort, run: Path, tmp_path: Path, make_cohort: Callable[..., Cohort]
) -> None:
    two = make_cohort(tmp_path / "two", num_classes=2, per_class=4)
    with pytest.raises(ConfigError, match="class-mismatch"):
        generate(two, run, tmp_path / "s")
    held = cohort.with_cases(training=cohort.training[2:], test=cohort.test + cohort.training[:2])
    with pytest.raises(LeakageError, match="fit-on-held-out"):
        from medaug.generation.generate import check_run

        check_run(read_run(run), held)
    record = read_run(run)
    assert isinstance(record.settings, dict)
    foreign = {**record.settings, "network": {"backbone": "lean"}}
    del foreign["generator"]
    (tmp_path / "foreign").mkdir()
    storage.write_json(tmp_path / "foreign" / RUN_FILE, storage.read_json(run / RUN_FILE) | {"settings": foreign})
    with pytest.raises(ConfigError, match="run-malformed.*does not hold a DAGAN"):
        generate(cohort, tmp_path / "foreign", tmp_path / "s")
    with pytest.raises(DataError, match="weights-missing"):
        load_generator(tmp_path / "foreign", record)


# --- configs ----------------------------------------------------------------------------------------------------------


def test_train_yaml_holds_the_published_values() -> None:
    config = read_yaml(assets.bundle_root("dagan") / "configs" / "train.yaml")
    given = config["dagan_settings"]
    assert (given["learning_rate"], given["betas"], given["ema_decay"]) == (1e-4, [0.0, 0.9], 0.0)
    assert (config["critic_steps"], config["penalty_weight"]) == (5, 10.0)
    assert (given["generator"]["latent_dim"], given["generator"]["dropout"], given["critic"]["channels"][0]) == (100, 0.5, 64)


@pytest.mark.parametrize("profile", [None, *assets.list_profiles()])
def test_every_profile_fits_and_leaves_the_method_alone(profile: str | None) -> None:
    config, own = load_config("dagan", "training", profile), load_config("dagan", "training")
    assert set(config) == set(own)
    assert (config["critic_steps"], config["penalty_weight"]) == (5, 10.0)
    assert set(config["dagan_settings"]) == set(own["dagan_settings"])
    assert config["dagan_settings"]["betas"] == [0.0, 0.9]


@pytest.mark.parametrize("stage", STAGES)
def test_the_bundle_names_itself(stage: str) -> None:
    path = assets.bundle_root("dagan") / "configs" / STAGES[stage]
    assert read_yaml(path)["bundle_root"] == "$str(assets.bundle_root('dagan'))"
    assert "lambda " not in path.read_text()


@pytest.fixture(scope="module")
def wide_cohort(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cohort]:
    """64 px: the size that every profile can be built for."""
    yield make_cohort(tmp_path_factory.mktemp("wide"), per_class=5, num_classes=2, size=64)


@pytest.mark.parametrize(("stage", "kind"), [("training", "train"), ("generating", "infer")])
@pytest.mark.parametrize("profile", assets.list_profiles())
def test_monai_finds_the_properties_it_asks_for(
    wide_cohort: Cohort, cohort: Cohort, run: Path, tmp_path: Path, profile: str, stage: str, kind: str
) -> None:
    from monai.bundle import ConfigWorkflow

    root = assets.bundle_root("dagan")
    workflow = ConfigWorkflow(
        config_file=[str(root / "configs" / STAGES[stage]), str(assets.profile_path(profile))],
        workflow_type=kind,
        run_id=stage,
        init_id=None,
        final_id=None,
        logging_file=str(root / "configs" / "logging.conf"),
        dataset_dir=str((wide_cohort if stage == "training" else cohort).root),
        output_dir=str(tmp_path / "out"),
        **({"run_dir": str(run)} if stage == "generating" else {}),
    )
    workflow.initialize()
    assert not workflow.check_properties()
    assert not (tmp_path / "out").exists()

"""Several processes take the steps of one: two gloo processes on the CPU beside one process on the joined batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import together
from safetensors.torch import load_file, save_file
from tiny_diffusion import SIZE, save_model
from tiny_run import BACKBONE
from torch import Tensor, nn
from torch.nn import functional as F

from medaug import assets
from medaug.cohort import Cohort
from medaug.errors import ConfigError
from medaug.training import distributed
from medaug.training.checkpoint import FILE_NAME
from medaug.training.data import KeyedBatches
from medaug.training.run_folder import RUN_FILE, WEIGHTS_FILE, RunRecord, read_run
from medaug.workflow import STAGES, run_stage

BUNDLES = ("guided_ddpm", "bottleneck_perturbation", "sdedit", "text_to_image", "uncertainty_guidance", "dagan")
OVERLAYS = {"uncertainty_guidance": "classifier", "text_to_image": "finetune"}
TINY: dict[str, Any] = {"batch_size": 4, "epoch_length": 2, "max_epochs": 3, "preview_every": 0, "device_name": "cpu"}
QUIET = TINY | {"tracking": {"enabled": False}}
DIFFUSION = {"network_settings#backbone_options": BACKBONE | {"dropout": 0.2}, "warmup_steps": 2}
DAGAN = {
    "dagan_settings#generator": {
        "channels": [4, 8],
        "patch": 2,
        "num_res_blocks": 1,
        "latent_dim": 3,
        "latent_scales": 1,
        "dropout": 0.5,
    },
    "dagan_settings#critic": {"channels": [4, 8], "patch": 2, "num_res_blocks": 1},
    "critic_steps": 1,
}
SMALL: dict[str, dict[str, Any]] = dict.fromkeys(BUNDLES, DIFFUSION) | {"dagan": DAGAN}


@pytest.fixture(scope="module")
def cohort(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    torch.set_num_threads(1)
    return make_cohort(tmp_path_factory.mktemp("cohort"), per_class=10)


def train(bundle: str, cohort: Cohort, out: Path, overlay: str | None = None, **overrides: Any) -> RunRecord:
    """`medaug train` in this process."""
    paths = {"dataset_dir": str(cohort.root), "output_dir": str(out)}
    small = {"classifier_settings#channels": [8, 16], "classifier_settings#norm_num_groups": 4} if overlay else SMALL[bundle]
    record: RunRecord = run_stage(bundle, "training", "tiny", QUIET | paths | small | overrides, overlay)
    return record


def largest_difference(one: Path, other: Path) -> float:
    first, second = load_file(one / WEIGHTS_FILE), load_file(other / WEIGHTS_FILE)
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


# --- shares and messages ----------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 3))
def test_shares_are_a_partition_in_order(size: int, each: int, rest: int) -> None:
    members = list(range(size * each))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: size)
        parts = []
        for rank in range(size):
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts.append(distributed.share(members))
        assert [member for part in parts for member in part] == members
        assert {len(part) for part in parts} == {each}
        if rest % size:
            with pytest.raises(ConfigError, match="batch-uneven.*multiple"):
                distributed.share([*members, *range(rest % size)])
            with pytest.raises(ConfigError, match="batch-uneven"):
                KeyedBatches(10, len(members) + rest % size)


def test_processes_draw_the_parts_of_one_batch() -> None:
    def work(rank: int) -> None:
        batches = KeyedBatches(7, 4, seed=3)
        batches.next_iteration = 5
        for iteration, drawn in zip(range(5, 9), batches, strict=False):
            assert drawn == KeyedBatches(7, 4, seed=3).batch(iteration)[2 * rank : 2 * rank + 2]

    assert together(work) == [0, 0]


def test_messages_arrive_in_order_of_rank() -> None:
    def work(rank: int) -> None:
        assert distributed.gather({"rank": rank, "text": "é" * rank}) == [{"rank": r, "text": "é" * r} for r in range(3)]
        torch.testing.assert_close(distributed.mean(torch.tensor([3.0 * rank])), torch.tensor([3.0]))
        distributed.refuse_difference(["same", 1])
        with pytest.raises(ConfigError, match="processes-differ"):
            distributed.refuse_difference(["sha", 10 * (rank == 1)])

    assert together(work, size=3) == [0, 0, 0]


def test_one_process_is_left_alone() -> None:
    row, members, parameter = {"loss": 1.5}, [1, 2, 3], nn.Parameter(torch.ones(2))
    parameter.grad = gradient = torch.ones(2)
    distributed.average_gradients([parameter])
    assert parameter.grad is gradient
    assert distributed.gather(row)[0] is row and distributed.share(members) == members and distributed.is_main()
    distributed.start(torch.device("cpu"))  # not under torchrun
    assert distributed.world_size() == 1
    distributed.stop()


@pytest.mark.parametrize(("name", "rank", "expected"), [("auto", "1", "cuda:1"), ("cuda", "0", "cuda:0"), ("cpu", "1", "cpu")])
def test_every_process_has_its_device(monkeypatch: pytest.MonkeyPatch, name: str, rank: str, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert distributed.local_device(name) == torch.device(expected)
    with pytest.raises(ConfigError, match="device-shared"):
        distributed.local_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="device-missing.*nproc_per_node"):
        distributed.local_device("cuda")


# --- the law: one gradient --------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Batch normalisation, drop-out, a weight that class 0 alone reaches and one that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(12, 2)
        self.rare, self.idle = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        h = F.dropout(F.silu(self.norm(self.conv(images))), 0.3, self.training)
        logits: Tensor = self.out(F.max_pool2d(h, 3).flatten(1))
        first = (labels == 0)[:, None]
        return logits + first * self.rare if bool(first.any()) else logits


def step(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients and running statistics after one pass."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = Layers().train()
        torch.manual_seed(1)
        F.cross_entropy(layers(images, labels), labels).backward()
    distributed.average_gradients(layers.parameters())
    assert layers.idle.grad is None
    return {name: p.grad for name, p in layers.named_parameters() if p.grad is not None} | dict(layers.named_buffers())


def test_two_processes_take_the_gradient_of_the_joined_batch(tmp_path: Path) -> None:
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[3:] = 3 * images[3:] + 2  # of other mean and spread than the first half
    labels = torch.tensor([0, 1, 0, 1, 1, 1])
    expected = step(images, labels)

    def work(rank: int) -> None:
        rows = slice(3 * rank, 3 * rank + 3)
        with distributed.joined_batch():
            save_file(step(images[rows], labels[rows]), tmp_path / f"joined{rank}")
        save_file(step(images[rows], labels[rows]), tmp_path / f"apart{rank}")

    assert together(work) == [0, 0]
    first, second = load_file(tmp_path / "joined0"), load_file(tmp_path / "joined1")
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(
            first[name], value, rtol=1e-5, atol=1e-6
        )  # float32 sums of 216 terms of size 1 in another order
    apart = load_file(tmp_path / "apart0")  # what a mean of gradients alone would give
    assert float((apart["conv.weight"] - expected["conv.weight"]).abs().max()) > 1e-3


def test_drop_out_of_the_shares_is_that_of_the_joined_batch(tmp_path: Path) -> None:
    whole = torch.rand(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = [F.dropout(whole, 0.5), F.dropout(whole, 0.2)]  # the second finds the generator where the first left it

    def work(rank: int) -> None:
        rows = whole[2 * rank :][:2]
        torch.manual_seed(0)
        with distributed.joined_batch():
            for p, wanted in zip((0.5, 0.2), expected, strict=True):
                assert torch.equal(F.dropout(rows, p), wanted[2 * rank :][:2])
            assert torch.equal(F.dropout(rows, 0.5, training=False), rows)
            norm = nn.BatchNorm2d(3).eval()
            assert torch.equal(norm(rows), norm(whole)[2 * rank :][:2])

    assert together(work) == [0, 0]


# --- the law: one run -------------------------------------------------------------------------------------------------

# SGD moves a weight in proportion to its gradient, so what remains is rounding: 2e-7 at most was seen after six steps. Adam divides by the
# gradient's size, and would blow up the rounding of a gradient of 0, as of a bias in front of a normalisation, to a whole step.
SGD = {"optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.05}}
SGD_CRITIC = {"critic_optimizer": {"_target_": "torch.optim.SGD", "params": "$@critic.parameters()", "lr": 0.05}}
# EfficientNet normalises a picture of 16 px by the few values its last maps have, some fifty times over: each step multiplies rounding by
# about 1e5 for 4 images. In float64, with 16 images, 5e-8 is left after six steps.


@pytest.fixture
def precision(bundle: str) -> Iterator[None]:
    torch.set_default_dtype(torch.float64 if bundle == "guided_ddpm" else torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("bundle", "overlay"),
    [
        ("guided_ddpm", None),
        ("bottleneck_perturbation", None),
        ("text_to_image", None),
        ("uncertainty_guidance", "classifier"),
        ("dagan", None),
    ],
)
@pytest.mark.usefixtures("precision")
def test_two_processes_end_with_the_weights_of_one(cohort: Cohort, tmp_path: Path, bundle: str, overlay: str | None) -> None:
    plain = SGD | {"batch_size": 16} | (SGD_CRITIC if bundle == "dagan" else {})
    one = train(bundle, cohort, tmp_path / "one", overlay, **plain)

    def work(rank: int) -> None:
        assert train(bundle, cohort, tmp_path / "two", overlay, **plain) == read_run(tmp_path / "two")

    assert together(work) == [0, 0]
    two = read_run(tmp_path / "two")
    assert (two.config_sha256, two.iterations) == (one.config_sha256, one.iterations) == (one.config_sha256, 6)
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    still = plain | {"optimizer": SGD["optimizer"] | {"lr": 0.0}, "max_epochs": 1}
    train(bundle, cohort, tmp_path / "still", overlay, **still)
    assert largest_difference(tmp_path / "one", tmp_path / "still") > 1e-3  # training goes further than the tolerance
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


def test_a_lost_process_ends_the_other_and_the_run_goes_on_with_any_number(cohort: Cohort, tmp_path: Path) -> None:
    def whole(rank: int) -> None:
        train("bottleneck_perturbation", cohort, tmp_path / "whole", **SGD)

    def lost(out: Path) -> Callable[[int], Any]:
        def work(rank: int) -> None:
            from medaug.training.diffusion import GuidedIteration

            take = GuidedIteration.__call__

            def failing(self: GuidedIteration, engine: Any, batch: dict[str, Any]) -> dict[str, Any]:
                if rank == 1 and int(batch["iteration"][0]) == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                return take(self, engine, batch)

            GuidedIteration.__call__ = failing  # type: ignore[method-assign]
            train("bottleneck_perturbation", cohort, out, **SGD)

        return work

    assert together(whole) == [0, 0]
    for name in ("two", "one"):
        assert together(lost(tmp_path / name), seconds=60) == [1, -signal.SIGKILL]
        assert (tmp_path / name / "checkpoint" / FILE_NAME).is_file() and not (tmp_path / name / RUN_FILE).exists()
    assert together(lambda rank: train("bottleneck_perturbation", cohort, tmp_path / "two", **SGD)) == [0, 0]
    assert (tmp_path / "two" / WEIGHTS_FILE).read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()
    assert train("bottleneck_perturbation", cohort, tmp_path / "one", **SGD).iterations == 6
    assert largest_difference(tmp_path / "one", tmp_path / "whole") < 1e-5


def test_divergence_in_one_process_is_refused_in_all() -> None:
    from medaug.training.diffusion import refuse_divergence

    def work(rank: int) -> None:
        refuse_divergence(torch.tensor(1.0), 1)
        with pytest.raises(ConfigError, match="training-diverged"):
            refuse_divergence(torch.tensor(float("inf") if rank else 1.0), 2)

    assert together(work) == [0, 0]


def test_a_batch_that_cannot_be_shared_is_refused(cohort: Cohort, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with pytest.raises(ConfigError, match="batch-uneven"):
            train("guided_ddpm", cohort, tmp_path / "run", batch_size=5)

    assert together(work) == [0, 0]
    assert not (tmp_path / "run").exists()


# --- the overlay ------------------------------------------------------------------------------------------------------


def files(bundle: str, *between: str) -> list[str]:
    folder = assets.bundle_root(bundle) / "configs"
    return [str(folder / name) for name in (STAGES["training"], *between)] + [
        str(assets.profile_path("tiny")),
        str(folder / "multi_gpu_train.yaml"),
    ]


@pytest.mark.parametrize(
    ("bundle", "between"),
    [*((bundle, ()) for bundle in BUNDLES), *((bundle, (f"{name}.yaml",)) for bundle, name in OVERLAYS.items())],
)
def test_every_bundle_has_the_overlay(cohort: Cohort, tmp_path: Path, bundle: str, between: tuple[str, ...]) -> None:
    from monai.bundle import ConfigWorkflow

    model: dict[str, Any] = {}
    if "finetune.yaml" in between:
        pytest.importorskip("diffusers")
        model = {"model_dir": str(save_model(tmp_path / "model")), "weights_trusted": True, "image_side": SIZE}
    workflow = ConfigWorkflow(
        config_file=files(bundle, *between),
        workflow_type="train",
        run_id="training",
        dataset_dir=str(cohort.root),
        output_dir=str(tmp_path / "run"),
        device_name="cpu",
        **model,
    )
    workflow.initialize()  # alone: there is no torchrun
    assert workflow.check_properties() == []
    assert workflow.device == torch.device("cpu")
    workflow.finalize()
    assert not (tmp_path / "run").exists()


# --- as a user starts it ----------------------------------------------------------------------------------------------

# Every bundle's arithmetic and every overlay are tested above; three processes that import MONAI are paid for once and for the kill.
PLAIN = SGD | DIFFUSION | {"batch_size": 16, "device_name": "cpu"}


@contextmanager
def torchrun(bundle: str, cohort: Cohort, folder: Path, **overrides: Any) -> Iterator[subprocess.Popen[str]]:
    """The documented command, with MLflow in `folder`, from another working directory; ended with the block."""
    options = {
        "config_file": files(bundle),
        "dataset_dir": cohort.root,
        "output_dir": folder / "run",
        "device_name": "cpu",
    } | overrides
    options |= {"tracking#uri": f"sqlite:///{folder / 'mlflow.db'}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]  # torchrun, on a free port
    command += ["-m", "monai.bundle", "run", "training"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(assets.bundles_root().parent),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as started:
        try:
            yield started
        finally:
            started.terminate()  # torchrun hands it on to its processes


def recorded(folder: Path) -> list[str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return [run.info.status for run in client.search_runs([found.experiment_id for found in client.search_experiments()])]


@pytest.mark.slow
@pytest.mark.integration
def test_torchrun_trains_what_one_process_trains(cohort: Cohort, tmp_path: Path) -> None:
    bundle, sizes = "bottleneck_perturbation", PLAIN | {"epoch_length": 1, "max_epochs": 3, "preview_every": 3}
    with torchrun(bundle, cohort, tmp_path, **sizes) as started:
        _, errors = started.communicate(timeout=900)
    assert started.returncode == 0, errors[-3000:]
    assert recorded(tmp_path) == ["FINISHED"]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["epoch_0000.png", "epoch_0003.png"]
    one, two = train(bundle, cohort, tmp_path / "one", **sizes), read_run(tmp_path / "run")
    assert (two.config_sha256, two.iterations) == (one.config_sha256, sizes["max_epochs"])
    assert largest_difference(tmp_path / "one", tmp_path / "run") < 1e-4


def children(pid: int) -> dict[int, int]:
    """Rank -> process id of what torchrun has started."""
    found = {}
    for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environment = dict(word.split("=", 1) for word in Path(f"/proc/{text}/environ").read_text().split("\0") if "=" in word)
        if "RANK" in environment:
            found[int(environment["RANK"])] = int(text)
    return found


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc")
def test_torchrun_ends_when_a_process_is_killed(cohort: Cohort, tmp_path: Path) -> None:
    sizes = PLAIN | {"max_epochs": 100_000, "epoch_length": 2, "batch_size": 4, "preview_every": 0}
    checkpoint, limit = tmp_path / "run" / "checkpoint" / FILE_NAME, time.monotonic() + 600
    assert recorded(tmp_path) == []  # makes the store: MLflow cannot go on with one whose making was cut off
    with torchrun("guided_ddpm", cohort, tmp_path, **sizes) as started:
        while not checkpoint.is_file() and started.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        processes = children(started.pid)
        os.kill(processes[1], signal.SIGKILL)
        _, errors = started.communicate(timeout=300)
    assert started.returncode not in (0, None), errors[-3000:]
    assert not Path(f"/proc/{processes[0]}").exists()
    # On a busy machine torchrun may end it before its record is closed; the next run closes that.
    assert recorded(tmp_path)[0] in ("FAILED", "KILLED", "RUNNING") and not (tmp_path / "run" / RUN_FILE).exists()

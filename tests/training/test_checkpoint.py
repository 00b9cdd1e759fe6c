from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch
from torch import nn

from medaug.errors import ConfigError
from medaug.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from medaug.training.diffusion import make_learning_rate_schedule
from medaug.training.ema import ExponentialMovingAverage


def new_state(seed: int = 0, width: int = 4) -> TrainingState:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 1, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    schedule = make_learning_rate_schedule("cosine", optimizer, 20, 3)
    return TrainingState(network, ExponentialMovingAverage(network, 0.9), optimizer, schedule)


def step(state: TrainingState, iteration: int) -> None:
    images = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(iteration))
    state.optimizer.zero_grad()
    state.network.train()
    state.network(images).square().mean().backward()
    state.optimizer.step()
    state.scheduler.step()
    state.ema.update(state.network)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_restored_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = new_state()
    for iteration in range(12):
        if iteration == 5:
            save_checkpoint(tmp_path / "c", whole, epoch=2, iteration=5, config_sha256="x")
        step(whole, iteration)
    resumed = new_state(seed=1)
    step(resumed, 99)  # a state that has to be overwritten whole
    assert load_checkpoint(tmp_path / "c", resumed, config_sha256="x") == (2, 5)
    for iteration in range(5, 12):
        step(resumed, iteration)
    assert same(resumed.network, whole.network) and same(resumed.ema.network, whole.ema.network)
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    assert resumed.ema.num_updates == whole.ema.num_updates


def test_checkpoint_keeps_the_global_random_state(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        save_checkpoint(tmp_path / "c", new_state(), epoch=0, iteration=0, config_sha256="x")
        expected = torch.rand(3)
        load_checkpoint(tmp_path / "c", new_state(), config_sha256="x")
        assert torch.equal(torch.rand(3), expected)


def test_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", new_state(), epoch=0, iteration=0, config_sha256="x")
    resumed = new_state(seed=1)
    assert load_checkpoint(tmp_path / "c", resumed, config_sha256="x") == (0, 0)
    assert same(resumed.network, new_state().network)


def test_file_is_safetensors_and_json_and_nothing_else(tmp_path: Path) -> None:
    state = new_state()
    step(state, 0)
    save_checkpoint(tmp_path / "c", state, epoch=1, iteration=1, config_sha256="x")
    with safetensors.safe_open(str(tmp_path / "c"), framework="pt") as file:
        names = set(file.keys())
        header = json.loads(file.metadata()["medaug"])
    assert {name.split("/")[0] for name in names} == {"network", "ema", "optimizer", "random"}
    assert (header["epoch"], header["iteration"], header["ema_updates"], header["config_sha256"]) == (1, 1, 1, "x")
    length = int.from_bytes((tmp_path / "c").read_bytes()[:8], "little")
    tensors = sum(
        row["data_offsets"][1] - row["data_offsets"][0] for name, row in _header(tmp_path / "c").items() if name != "__metadata__"
    )
    assert (tmp_path / "c").stat().st_size == 8 + length + tensors  # no room for anything pickled


def _header(path: Path) -> dict[str, dict[str, list[int]]]:
    data = path.read_bytes()
    header: dict[str, dict[str, list[int]]] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


def test_other_config_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", new_state(), epoch=1, iteration=1, config_sha256="x")
    with pytest.raises(ConfigError, match="checkpoint-other-config"):
        load_checkpoint(tmp_path / "c", new_state(), config_sha256="y")


def test_other_network_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", new_state(), epoch=1, iteration=1, config_sha256="x")
    with pytest.raises(ConfigError, match="checkpoint-other-network"):
        load_checkpoint(tmp_path / "c", new_state(width=5), config_sha256="x")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    save_checkpoint(tmp_path / "c", new_state(), epoch=1, iteration=1, config_sha256="x")
    data = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConfigError, match="checkpoint-unreadable"):
        load_checkpoint(tmp_path / "c", new_state(), config_sha256="x")


def test_pickle_is_refused_unread(tmp_path: Path) -> None:
    torch.save({"network": new_state().network}, tmp_path / "c")
    with pytest.raises(ConfigError, match="checkpoint-unreadable"):
        load_checkpoint(tmp_path / "c", new_state(), config_sha256="x")


def test_safetensors_of_another_program_is_refused(tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "c")
    with pytest.raises(ConfigError, match="checkpoint-unreadable"):
        load_checkpoint(tmp_path / "c", new_state(), config_sha256="x")

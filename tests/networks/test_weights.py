"""Weight files: what goes in comes out, the bytes do not depend on chance, and everything else is refused."""

from __future__ import annotations

import contextlib
import hashlib
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from medaug.errors import ConfigError
from medaug.networks.weights import load_weights, read_metadata, read_tensors, save_weights

METADATA = {"num_classes": "3", "bundle": "guided_ddpm", "name": "Lunge \u00e4"}


def _network(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(path, _network(), METADATA)
    return path


def _assert_refused(path, code: str, match: str, network: nn.Module | None = None, **options) -> None:
    network = _network(1) if network is None else network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ConfigError, match=match) as caught:
        load_weights(path, network, **options)
    assert caught.value.code == code
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_round_trip(tmp_path):
    network, other = _network(0), _network(1)
    digest = save_weights(tmp_path / "m.safetensors", network, METADATA)
    assert digest == hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()
    assert load_weights(tmp_path / "m.safetensors", other, {"num_classes": 3}, sha256=digest) == METADATA
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True))
    assert read_metadata(tmp_path / "m.safetensors") == METADATA


def test_the_library_reads_our_files(saved):
    theirs = load_file(saved)
    assert theirs.keys() == _network().state_dict().keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in _network().state_dict().items())


def test_same_weights_same_bytes(tmp_path):
    state = _network().state_dict()
    one = save_weights(tmp_path / "a", state, METADATA)
    other = save_weights(tmp_path / "b", dict(reversed(state.items())), dict(reversed(METADATA.items())))
    assert one == other
    assert one != save_weights(tmp_path / "c", state, {**METADATA, "num_classes": "4"})
    assert one != save_weights(tmp_path / "d", _network(5).state_dict(), METADATA)


def test_shared_and_strided_tensors(tmp_path):
    network = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    network["b"].weight = network["a"].weight
    network["a"].bias = nn.Parameter(torch.arange(6.0)[::2])
    save_weights(tmp_path / "m", network)
    tensors = read_tensors(tmp_path / "m")
    assert torch.equal(tensors["a.weight"], tensors["b.weight"])
    assert tensors["a.bias"].tolist() == [0, 2, 4]


def test_pickle_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "boom"), "w")

    torch.save(_network().state_dict(), tmp_path / "zip.safetensors")
    (tmp_path / "bare.safetensors").write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), tmp_path / "bomb.pt")
    for name in ("zip.safetensors", "bare.safetensors", "bomb.pt"):
        _assert_refused(tmp_path / name, "weights-pickle", "pickled torch file")
    for name in ("bare.safetensors", "bomb.pt"):
        with pytest.raises(ConfigError, match="no torch file of plain tensors"):
            read_tensors(tmp_path / name, allow_torch=True)
    assert not (tmp_path / "boom").exists()


def test_torch_files_on_request(tmp_path):
    state = _network().state_dict()
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "m.pt")
    assert read_tensors(tmp_path / "m.pt", allow_torch=True).keys() == state.keys()
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ConfigError, match="does not hold a state dict"):
        read_tensors(tmp_path / "none.pt", allow_torch=True)


def test_files_that_are_no_weights(tmp_path, saved):
    _assert_refused(tmp_path / "absent", "weights-missing", "not there")
    _assert_refused(tmp_path, "weights-unreadable", "cannot be read")
    pointer = tmp_path / "pointer"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    _assert_refused(pointer, "weights-lfs-pointer", "git lfs pull")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated_anywhere(saved, share):
    data = saved.read_bytes()
    cut = saved.with_name("cut")
    cut.write_bytes(data[: int(share * len(data))])
    _assert_refused(cut, "weights-unreadable", "truncated")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_header_never_ends_in_another_error(saved, place, value):
    data = bytearray(saved.read_bytes())
    data[place] = value
    damaged = saved.with_name("damaged")
    damaged.write_bytes(data)
    with contextlib.suppress(ConfigError):
        load_weights(damaged, _network(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(tmp_path, saved, value):
    state = load_file(saved)
    state["0.weight"][0, 0] = value
    with pytest.raises(ConfigError, match="NaN or infinite numbers in 0.weight"):
        save_weights(tmp_path / "m", state)
    from safetensors.torch import save_file

    save_file(state, tmp_path / "m")
    _assert_refused(tmp_path / "m", "weights-not-finite", "0.weight")


def test_other_networks(saved):
    _assert_refused(saved, "weights-mismatch", r"0.bias is \(4,\) instead of \(5,\); .* and \d more", network=_network(width=5))
    _assert_refused(saved, "weights-mismatch", "2.bias is unknown", network=_network()[:2])
    _assert_refused(saved, "weights-mismatch", "3.bias is missing", network=_network().append(nn.Linear(2, 2)))


def test_other_metadata(saved):
    _assert_refused(saved, "weights-classes", "made for 3 classes, this cohort has 4", expect={"num_classes": 4})
    _assert_refused(saved, "weights-metadata", "bundle guided_ddpm, dagan is needed", expect={"bundle": "dagan"})
    _assert_refused(saved, "weights-metadata", "does not say its image_size", expect={"image_size": 32})
    _assert_refused(saved, "weights-digest", "sha256 differs", sha256="0" * 64)

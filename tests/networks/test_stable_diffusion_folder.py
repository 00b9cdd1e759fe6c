"""A model folder is refused before anything of it is loaded, with the file and the option in the message."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusion import no_network, save_model

from medaug import storage
from medaug.errors import ConfigError, MissingDependencyError
from medaug.networks.stable_diffusion import load_parts
from medaug.networks.stable_diffusion_folder import check_folder

UNET = "unet/diffusion_pytorch_model.safetensors"
ALL_FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    UNET,
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(model: Path | None, code: str, match: str) -> None:
    with no_network() as tried, pytest.raises(ConfigError, match=match) as caught:
        check_folder(model)
    assert caught.value.code == code and not tried
    assert model is None or str(model.parent) not in caught.value.message


def test_digest_is_that_of_the_sorted_digests_of_the_weights(model: Path) -> None:
    folder = check_folder(model)
    files = sorted(model.rglob("*.safetensors"))
    assert len(files) == 3
    assert folder.weights_sha256() == storage.sha256_json(sorted(map(storage.sha256_file, files)))
    assert folder.weights_sha256(files[0]) != folder.weights_sha256()


def test_settings_digest_follows_scheduler_and_vocabulary(model: Path) -> None:
    before = check_folder(model).settings_sha256()
    edit(model / "scheduler" / "scheduler_config.json", beta_end=0.02)
    assert check_folder(model).settings_sha256() != before


def test_no_folder_is_refused_with_the_option(tmp_path: Path) -> None:
    refused(None, "model-missing", "none is named; set model_dir")
    refused(tmp_path / "nowhere", "model-missing", "nowhere is not a folder; set model_dir")


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    refused(model, "model-incomplete", f"{name} is missing from the folder that model_dir names")


def test_a_missing_vocabulary_is_named(model: Path) -> None:
    (model / "tokenizer" / "tokenizer.json").unlink()
    refused(model, "model-incomplete", "vocab.json with merges.txt")


@pytest.mark.parametrize("suffix", ["bin", "ckpt", "pt"])
def test_a_pickle_in_the_place_of_safetensors_is_refused(model: Path, suffix: str) -> None:
    (model / UNET).rename(model / "unet" / f"diffusion_pytorch_model.{suffix}")
    refused(model, "model-pickled", f"unet/diffusion_pytorch_model.{suffix} of model_dir is a pickle")


def test_a_pickle_beside_safetensors_is_never_opened(model: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return (Path.touch, (model / "exploded",))

    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        for part in ("unet", "vae", "text_encoder"):
            (model / part / name).write_bytes(pickle.dumps(Bomb()))
    load_parts(check_folder(model))
    assert not (model / "exploded").exists()


def test_a_pickle_named_safetensors_is_refused(model: Path) -> None:
    torch.save({"x": torch.ones(1)}, model / UNET)
    refused(model, "weights-pickle", "pickled torch file")


def test_a_truncated_file_is_refused(model: Path) -> None:
    (model / UNET).write_bytes((model / UNET).read_bytes()[:-10])
    refused(model, "weights-unreadable", "truncated")


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, "model-class"),
        ({"_class_name": ["own_pipeline", "OwnPipeline"]}, "model-class"),
        ({"unet": ["own_code", "UNet2DConditionModel"]}, "model-class"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "model-class"),
        ({"text_encoder": ["transformers", "AutoModel"]}, "model-class"),
        ({"scheduler": ["os", "system"]}, "model-class"),
        ({"safety_checker": ["own_code", "Checker"]}, "model-class"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "model-class"),
        ({"custom_pipeline": "own"}, "model-code"),
        ({"trust_remote_code": True}, "model-code"),
    ],
)
def test_another_pipeline_or_class_is_refused(model: Path, values: dict[str, Any], code: str) -> None:
    edit(model / "model_index.json", **values)
    refused(model, code, next(iter(values)).lstrip("_").split("_")[0])


@pytest.mark.parametrize("file", [name for name in ALL_FILES if name.endswith(".json")][1:])
def test_a_part_that_asks_for_code_is_refused(model: Path, file: str) -> None:
    edit(model / file, auto_map={"AutoModel": "own.Model"})
    refused(model, "model-code", "auto_map")


def test_a_part_of_another_class_than_the_index_says_is_refused(model: Path) -> None:
    edit(model / "unet" / "config.json", _class_name="UNet3DConditionModel")
    refused(model, "model-class", "unet/config.json is of 'UNet3DConditionModel'")


@pytest.mark.parametrize("place", ["pipeline.py", "unet/own.py"])
def test_program_code_is_refused(model: Path, place: str) -> None:
    (model / place).write_text("raise SystemExit")
    refused(model, "model-code", "program code")


def test_broken_json_is_refused(model: Path) -> None:
    (model / "vae" / "config.json").write_text("{")
    refused(model, "model-malformed", "vae/config.json")


def test_shards_are_read_and_may_not_leave_their_folder(model: Path) -> None:
    tensors = load_file(model / UNET)
    names = sorted(tensors)
    shards = {name: f"diffusion_pytorch_model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        part = {name: tensors[name] for name in names if shards[name] == shard}
        save_file(part, model / "unet" / shard, metadata={"format": "pt"})
    (model / UNET).unlink()
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    loaded = load_parts(check_folder(model)).unet.state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in names)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../vae/diffusion_pytorch_model.safetensors")}))
    refused(model, "model-malformed", "its own folder")


@pytest.mark.parametrize(("file", "part"), [(UNET, "unet"), ("text_encoder/model.safetensors", "text_encoder")])
def test_a_tensor_that_is_not_there_is_never_random(model: Path, file: str, part: str) -> None:
    tensors = load_file(model / file)
    del tensors[sorted(tensors)[3]]
    save_file(tensors, model / file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"weights of the {part} lack") as caught:
        load_parts(check_folder(model))
    assert caught.value.code == "model-unloadable"


def test_settings_that_do_not_fit_the_weights_are_refused(model: Path) -> None:
    edit(model / "unet" / "config.json", block_out_channels=[8, 32])
    with pytest.raises(ConfigError, match="unet") as caught:
        load_parts(check_folder(model))
    assert caught.value.code == "model-unloadable" and str(model.parent) not in caught.value.message


@pytest.mark.parametrize("package", ["diffusers", "transformers", "peft"])
def test_without_the_extra_it_is_named(model: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"pip install -e '\.\[text\]'"):
        load_parts(check_folder(model))


@pytest.mark.parametrize(
    "shard", ["diffusion_pytorch_model-00001-of-00001.safetensors", "diffusion_pytorch_model-00001-of-00001.bin"]
)
def test_shards_beside_a_whole_file_are_refused(model: Path, shard: str) -> None:
    """diffusers would load the shards, and neither the checks nor the digest would have seen them."""
    tensors = {name: torch.zeros_like(value) for name, value in load_file(model / UNET).items()}
    if shard.endswith(".bin"):
        torch.save(tensors, model / "unet" / shard)
    else:
        save_file(tensors, model / "unet" / shard, metadata={"format": "pt"})
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}))
    refused(model, "model-malformed", "remove one")

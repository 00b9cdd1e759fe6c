"""A CLIP text model from a local folder: what it reads, what it refuses, and that the network stays out of it."""

from __future__ import annotations

import copy
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from medaug.errors import ConfigError
from medaug.networks.build import build_guided_unet
from medaug.networks.conditioning import with_conditioning
from medaug.networks.text_encoder import LocalTransformersText, check_folder, folder_digest

SETTINGS = {"backbone": "lean", "backbone_options": {"channels": [8, 16]}}
FILES = ("text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/vocab.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP text model of 16 channels that knows bytes."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("clip")
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = {word: index for index, word in enumerate([*characters, *(f"{c}</w>" for c in characters)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (root / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    size = len(vocabulary)
    config = transformers.CLIPTextConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    torch.manual_seed(0)
    transformers.CLIPTextModel(config).save_pretrained(root / "text_encoder")
    return root


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.slow  # transformers takes twenty seconds to import
def test_it_reads_like_transformers_and_trains_nothing(folder: Path, no_network: None) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = LocalTransformersText(folder)
    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        ["a cat"], padding="max_length", max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(folder / "text_encoder")(**words).last_hidden_state
    context = encoder.encode(["a cat", "a dog", "a cat"])
    assert context.shape == (3, 12, 16) and encoder.dimension == 16
    torch.testing.assert_close(context[:1], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(context[0], context[2]) and not torch.equal(context[0], context[1])
    null = encoder.null_context(2)
    assert null.shape == (2, 12, 16) and min((null[0] - row).abs().max() for row in context) > 1e-3
    assert not list(encoder.parameters()) and not encoder.state_dict() and not context.requires_grad
    assert len(encoder._frozen.contexts) == 3  # each once
    assert copy.deepcopy(encoder)._frozen is encoder._frozen  # an average of weights needs no second text model


@pytest.mark.slow
def test_a_network_records_which_files_it_was_trained_with(folder: Path, tmp_path: Path, no_network: None) -> None:
    named = with_conditioning(SETTINGS, {"encoder": "local_text"}, folder)
    assert named["conditioning"]["options"] == {"sha256": folder_digest(folder)} and str(folder) not in json.dumps(named)
    network = build_guided_unet(named, 1, 2, folder)
    assert network.context(["a", "b"]).shape == (2, 12, 16)
    network.context(["a", "b"])
    loss = network(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0]), context=network.context(["a", "b"])).square().sum()
    loss.backward()  # a context made without gradients enters a graph
    with pytest.raises(ConfigError, match="text-encoder-missing.*text_encoder_dir"):
        build_guided_unet(named, 1, 2)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / FILES[0]).read_text())
    (other / FILES[0]).write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ConfigError, match="text-encoder-changed"):
        build_guided_unet(named, 1, 2, other)


@pytest.mark.slow
def test_files_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="text-encoder-missing.*nowhere"):
        LocalTransformersText(tmp_path / "nowhere")
    for number, name in enumerate(FILES):
        copied = tmp_path / str(number)
        shutil.copytree(folder, copied)
        (copied / name).unlink()
        with pytest.raises(ConfigError, match=f"text-encoder-file.*text_encoder_dir.*{Path(name).name}"):
            check_folder(copied)
    with pytest.raises(ConfigError, match="condition-kind"):
        LocalTransformersText(folder).encode(torch.tensor([0]))
    broken = tmp_path / "0"
    (broken / FILES[0]).write_text("{")
    with pytest.raises(ConfigError, match="text-encoder-unreadable"):
        LocalTransformersText(broken)


def test_a_pickle_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="weights-pickle.*pytorch_model.bin"):
        check_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="weights-pickle.*model.safetensors"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("shards", "code"),
    [
        ({"a": "pytorch_model-00001.bin"}, "weights-pickle"),
        ({"a": "../model-00001.safetensors"}, "text-encoder-unreadable"),
        ({"a": "model-00002.safetensors"}, "text-encoder-file"),
        ({"a": "other.safetensors"}, "text-encoder-unreadable"),
        ({}, "text-encoder-unreadable"),
        ([1], "text-encoder-unreadable"),
    ],
)
def test_shards_are_whole_safetensors_of_the_folder(tmp_path: Path, shards: object, code: str) -> None:
    encoder = tmp_path / "text_encoder"
    encoder.mkdir()
    for path in (encoder / "config.json", tmp_path / "tokenizer.json"):
        path.write_text("{}")
    index = encoder / "model.safetensors.index.json"
    for name in ("model-00001.safetensors", "other.safetensors", "../model-00001.safetensors"):
        save_file({"a": torch.zeros(1)}, encoder / name)
    torch.save({"a": torch.zeros(1)}, encoder / "pytorch_model-00001.bin")
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(ConfigError) as caught:
        check_folder(tmp_path)
    assert caught.value.code == code
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-00001.safetensors"}}))
    check_folder(tmp_path)

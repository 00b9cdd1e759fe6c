"""Condition encoders: shapes, hashing against a second implementation, the null context, and how the U-Nets take a context in."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor

from medaug.errors import ConfigError
from medaug.networks import conditioning
from medaug.networks.build import build_guided_unet
from medaug.networks.conditioning import ClassToken, HashedText, build_condition_encoder, with_conditioning
from medaug.networks.guided_unet import GuidedUNet
from medaug.networks.lean_unet import LeanUNet
from medaug.networks.unet import MonaiUNet

PROMPTS = ["a photo of a large cell carcinoma", "Grade+", "grade-", "a photo of a large cell carcinoma"]
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
TIME = torch.tensor([3.0, 700.0])
MONAI = {"channels": (8, 16), "norm_num_groups": 4, "num_head_channels": 8}
BACKBONES = {
    "lean": {"backbone": "lean", "backbone_options": {"channels": [8, 16]}},
    "monai": {"backbone": "monai", "backbone_options": MONAI},
}


def written_again(encoder: HashedText, text: str) -> Tensor:
    """The context of an ASCII prompt, token by token."""
    words = [part for part in re.split(r"(\W)|\s", text.lower()) if part and not part.isspace()]
    tokens = ["w:" + word for word in words]
    for word in ("<" + word + ">" for word in words):
        for first in range(len(word) - 2):
            if (token := "t:" + word[first] + word[first + 1] + word[first + 2]) not in tokens:
                tokens.append(token)
    rows = torch.zeros(encoder.length, encoder.dimension)
    half = encoder.dimension // 2
    for place, token in enumerate(tokens[: encoder.length]):
        digest = hashlib.new("blake2b", token.encode(), digest_size=8).digest()
        row = sum(byte << 8 * index for index, byte in enumerate(digest)) % encoder.vocabulary
        for i in range(encoder.dimension):
            angle = place / 10_000 ** ((i % half) / half)
            rows[place, i] = encoder.embedding.weight[row, i] + (math.sin(angle) if i < half else math.cos(angle))
    return rows


@settings(deadline=None, max_examples=25)
@given(st.text(st.sampled_from("abcXYZ019 -+_.,"), max_size=40))
def test_hashed_text_is_what_it_says(text: str) -> None:
    torch.manual_seed(0)
    encoder = HashedText(dimension=6, length=16, vocabulary=97)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode([text])[0], written_again(encoder, text), atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoder", [HashedText(8), ClassToken(4, 8, tokens=3)], ids=["text", "class"])
def test_contexts_have_their_shape_and_null_differs_from_all(encoder: HashedText | ClassToken) -> None:
    conditions = PROMPTS if encoder.takes_text else torch.tensor([0, 1, 2, 0])
    context, null = encoder.encode(conditions), encoder.null_context(4)
    assert context.shape == null.shape == (4, 32 if encoder.takes_text else 3, 8)
    assert torch.equal(context[0], context[3])
    assert torch.pdist(torch.cat([context[:3], null[:1]]).flatten(1)).min() > 0.1
    assert torch.equal(null[0], null[3])
    context.sum().backward()
    encoder.null_context(1).sum().backward()  # null is learned too
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


def test_a_context_does_not_depend_on_its_batch_or_case() -> None:
    encoder = HashedText(8)
    assert torch.equal(encoder.encode(PROMPTS)[1], encoder.encode(["GRADE+"])[0])
    assert not torch.equal(encoder.encode(["grade+"]), encoder.encode(["grade-"]))


def test_each_distinct_prompt_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = conditioning.hashed_tokens
    monkeypatch.setattr(conditioning, "hashed_tokens", lambda text, size: asked.append(text) or real(text, size))
    HashedText(8).encode(PROMPTS * 3)
    assert sorted(asked) == sorted(set(PROMPTS))


def test_another_process_makes_the_same_context() -> None:
    program = (
        "import hashlib, torch; from medaug.networks.conditioning import HashedText; torch.manual_seed(0); "
        f"print(hashlib.sha256(HashedText(8).encode({PROMPTS!r}).detach().numpy().tobytes()).hexdigest())"
    )
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {"PYTHONHASHSEED": other, "PYTHONPATH": str(Path(conditioning.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    torch.manual_seed(0)
    here = hashlib.sha256(HashedText(8).encode(PROMPTS).detach().numpy().tobytes()).hexdigest()
    assert done.stdout.strip() == here


def test_a_long_prompt_is_cut_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    conditioning._say_cut.cache_clear()
    encoder = HashedText(8, length=4)
    with caplog.at_level(logging.WARNING):
        long = encoder.encode(["one two three four five", "one two three four six"])
    assert torch.equal(long[0], long[1])
    assert [record.message.split(":")[0] for record in caplog.records] == ["prompt-cut"]
    assert "three" not in caplog.text


@pytest.mark.parametrize(
    ("build", "code"),
    [
        (lambda: HashedText(7), "conditioning-size.*even"),
        (lambda: HashedText(8, length=0), "conditioning-size.*length"),
        (lambda: ClassToken(3, 8, tokens=True), "conditioning-size.*tokens"),
        (lambda: HashedText(8).encode(torch.tensor([0])), "condition-kind"),
        (lambda: ClassToken(3, 8).encode(["a"]), "condition-kind"),
        (lambda: ClassToken(3, 8).encode(torch.tensor([4])), r"condition-kind.*\[0, 3\]"),
        (lambda: build_condition_encoder({"encoder": "gpt"}, 2), "encoder-unknown.*class_token, hashed_text, local_text"),
        (lambda: build_condition_encoder({"encoder": "hashed_text", "length": 3}, 2), "encoder-unknown.*length"),
        (lambda: build_condition_encoder({"encoder": "hashed_text", "options": {"tokens": 3}}, 2), "setting-unknown"),
        (lambda: build_condition_encoder({"encoder": "class_token"}, 2, "folder"), "text-encoder-option"),
        (lambda: GuidedUNet(LeanUNet(1, 1, (8,), context_dim=4), condition_encoder=HashedText(8)), "context-shape"),
        (lambda: GuidedUNet(LeanUNet(1, 1, (8,))).context(["a"]), "context-unexpected"),
        (lambda: LeanUNet(1, 1, (8,), context_dim=4)(X, TIME), r"context-shape.*\(2, L, 4\), got None"),
        (lambda: LeanUNet(1, 1, (8,), context_dim=4)(X, TIME, context=torch.zeros(2, 3, 5)), r"context-shape.*\(2, 3, 5\)"),
        (lambda: MonaiUNet(1, 1, **MONAI)(X, TIME, context=torch.zeros(2, 3, 5)), "context-unexpected"),
    ],
)
def test_what_does_not_fit_is_refused(build, code) -> None:
    with pytest.raises(ConfigError, match=code):
        build()


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("options", [{}, {"num_res_blocks": 2, "attention_levels": (True, True)}, {"resblock_updown": True}])
def test_four_calls_with_a_context_equal_monai_bit_for_bit(options, num_classes, awaken) -> None:
    unet = awaken(MonaiUNet(1, 1, **MONAI, **options, num_classes=num_classes, context_dim=6)).eval()
    context = torch.randn(2, 5, 6)
    labels = None if num_classes is None else torch.tensor([1, 3])
    with torch.no_grad():
        expected = DiffusionModelUNet.forward(unet, X, TIME, context=context, class_labels=labels)
        other = unet(X, TIME, labels, context + 1)
        assert torch.equal(unet(X, TIME, labels, context), expected)
    assert expected.abs().max() > 1e-3 and not torch.equal(other, expected)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_both_backbones_listen_to_the_prompt(backbone: str, awaken) -> None:
    named = with_conditioning(
        BACKBONES[backbone] | {"class_conditional": True}, {"encoder": "hashed_text", "options": {"dimension": 8}}
    )
    network = awaken(build_guided_unet(named, 1, 2)).eval()
    assert network.num_classes is None and network.takes_text
    with torch.no_grad():
        one, two = (network(X, TIME, context=network.context([text] * 2)) for text in ("normal", "carcinoma"))
        null = network(X, TIME, context=network.null_context(2))
        mixed = network(X, TIME, context=network.context(["normal", "carcinoma"], torch.tensor([True, False])))
        assert torch.equal(network(X, TIME), null)
        torch.testing.assert_close(mixed, torch.cat([one[:1], null[1:]]), atol=1e-6, rtol=1e-5)
    assert torch.pdist(torch.stack([one, two, null]).flatten(1)).min() > 1e-3


def test_a_network_without_a_context_keeps_its_tensors() -> None:
    plain = LeanUNet(1, 1, (8, 16))
    assert not [name for name in plain.state_dict() if "context" in name]
    more = set(LeanUNet(1, 1, (8, 16), context_dim=4).state_dict()) - set(plain.state_dict())
    assert more and all(name.startswith("context_") for name in more)

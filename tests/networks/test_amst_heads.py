"""AMST's heads: the penalty by hand, drop-out that belongs to the image, the backbone once, checkpoints that fit."""

from __future__ import annotations

import pytest
import timm
import torch

from medaug.errors import ConfigError
from medaug.networks.amst import (
    ONE_HEAD,
    AuxiliaryHeads,
    feature_dimension,
    fit_metadata,
    load_backbone,
    main_head,
    mc_probabilities,
    orthogonality_penalty,
)
from medaug.networks.grading import build_network, penultimate
from medaug.networks.weights import save_weights


def orthonormal_rows(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    draw = torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draw).Q.T


def network_and_heads(name="simple_cnn", dropout=0.5, classes=3, size=16):
    torch.manual_seed(0)
    network = build_network(name, classes, 1, size)
    return network, AuxiliaryHeads(feature_dimension(network, 1, size), classes, dropout=dropout)


def batch(count=5, size=16, channels=1):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def test_penalty_is_zero_for_orthogonal_and_k_for_identical_orthonormal_weights():
    both = orthonormal_rows(8, 20)
    assert orthogonality_penalty(both[:4], both[4:]) == pytest.approx(0, abs=1e-12)
    assert orthogonality_penalty(both[:4], both[:4]) == pytest.approx(4, abs=1e-12)
    by_hand = orthogonality_penalty(torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]]))
    assert by_hand == 3 + 3 + 0 + 1  # rows times rows: 3, 1 + 2, 0, -1


def test_penalty_of_the_heads_pairs_heads_of_one_view_and_leaves_biases_out():
    _, heads = network_and_heads()
    w = [head.weight.detach() for head in heads.heads]
    expected = sum(float((w[i] @ w[j].T).abs().sum()) for i, j in ((0, 1), (2, 3)))
    assert heads.penalty().item() == pytest.approx(expected, rel=1e-6) and expected > 0
    with torch.no_grad():
        for head in heads.heads:
            head.bias += 100
    assert heads.penalty().item() == pytest.approx(expected, rel=1e-6)
    assert AuxiliaryHeads(8, 3, ONE_HEAD).penalty().item() == 0


@pytest.mark.parametrize("name", ["simple_cnn", "resnet18", "test_vit"])
def test_the_backbone_runs_once_per_image_and_modes_come_back(name):
    network, heads = network_and_heads(name, size=32)
    network.train()
    seen = []
    original = network.forward_features
    network.forward_features = lambda x: seen.append((len(x), network.training)) or original(x)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    probs = mc_probabilities(network, heads, batch(size=32), [(index,) for index in range(5)], passes=7)
    assert seen == [(5, False)]
    assert probs.shape == (4, 5, 7, 3) and probs.dtype == torch.float64
    torch.testing.assert_close(probs.sum(-1), torch.ones(4, 5, 7, dtype=torch.float64))
    assert network.training and all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert probs.var(dim=2).max() > 0


def test_mc_passes_equal_dropout_applied_pass_by_pass():
    """The batched form against the plain one: for each head and pass, the features masked, scaled and sent through."""
    network, heads = network_and_heads()
    network.eval()
    keys = [("k", index) for index in range(5)]
    with torch.no_grad():
        features = penultimate(network, batch())
        logits = heads.mc_logits(features, keys, 6)
        from medaug.draws import torch_generator

        for image, key in enumerate(keys):
            masks = torch.rand((4, 6, features.shape[1]), generator=torch_generator(*key, "dropout")) >= 0.5
            for head in range(4):
                for number in range(6):
                    plain = heads.heads[head](features[image] * masks[head, number] * 2)
                    torch.testing.assert_close(logits[head, image, number], plain, atol=1e-5, rtol=1e-5)


def test_scores_of_an_image_do_not_depend_on_its_neighbours():
    network, heads = network_and_heads()
    keys = [("k", index) for index in range(5)]
    whole = mc_probabilities(network, heads, batch(), keys, 4)
    alone = torch.cat([mc_probabilities(network, heads, batch()[i : i + 1], keys[i : i + 1], 4) for i in range(5)], dim=1)
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-4)  # convolutions round differently in another batch
    assert torch.equal(whole, mc_probabilities(network, heads, batch(), keys, 4))


def test_without_dropout_all_passes_are_the_same_bits():
    network, heads = network_and_heads(dropout=0.0)
    probs = mc_probabilities(network, heads, batch(), [(index,) for index in range(5)], 20)
    assert torch.equal(probs, probs[:, :, :1].expand_as(probs))


def test_training_drops_features_and_evaluation_does_not():
    network, heads = network_and_heads()
    features = torch.ones(2, 128)
    first, second = heads.train().logits("weak", features), heads.logits("weak", features)
    assert len(first) == 2 and not torch.equal(first[0], second[0])
    heads.eval()
    assert torch.equal(heads.logits("strong", features)[1], heads.heads[3](features))


def test_checkpoint_of_the_same_classes_is_taken_whole(tmp_path):
    network, _ = network_and_heads()
    save_weights(tmp_path / "w.safetensors", network, {"fit_groups": '["g1", "g2"]'})
    other = build_network("simple_cnn", 3, 1, 16)
    assert load_backbone(tmp_path / "w.safetensors", other) == ("g1", "g2")
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_network_beside_its_heads_is_taken_and_says_what_it_saw(tmp_path):
    network, heads = network_and_heads()
    both = torch.nn.ModuleDict({"network": network, "heads": heads})
    save_weights(tmp_path / "w.safetensors", both, fit_metadata(["g2", "g1", "g2"]))
    other = build_network("simple_cnn", 3, 1, 16)
    assert load_backbone(tmp_path / "w.safetensors", other) == ("g1", "g2")
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True))


def test_checkpoint_of_another_class_count_is_refused_or_keeps_its_backbone(tmp_path):
    network = build_network("simple_cnn", 7, 1, 16)
    save_weights(tmp_path / "w.safetensors", network)
    other = build_network("simple_cnn", 3, 1, 16)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ConfigError, match="made for 7 classes, this cohort has 3") as caught:
        load_backbone(tmp_path / "w.safetensors", other)
    assert (caught.value.code, caught.value.exit_code) == ("weights-classes", 2)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    assert load_backbone(tmp_path / "w.safetensors", other, replace_head=True) is None  # unknown, which is not "no group"
    assert torch.equal(other.features[0].weight, network.features[0].weight)
    assert torch.equal(other.classifier.weight, before["classifier.weight"])


def test_a_timm_checkpoint_for_colour_serves_grey_images(tmp_path):
    colour = timm.create_model("test_resnet", pretrained=False, num_classes=10)
    save_weights(tmp_path / "w.safetensors", colour)
    grey = build_network("test_resnet", 3, 1, 32)
    load_backbone(tmp_path / "w.safetensors", grey, replace_head=True)
    x = batch(2, 32)
    with torch.no_grad():
        expected = penultimate(colour.eval(), x.repeat(1, 3, 1, 1))
        torch.testing.assert_close(penultimate(grey.eval(), x), expected, atol=1e-4, rtol=1e-4)


def test_other_checkpoints_are_refused(tmp_path):
    save_weights(tmp_path / "w.safetensors", build_network("test_resnet", 3, 1, 32))
    network = build_network("simple_cnn", 3, 1, 16)
    with pytest.raises(ConfigError, match="weights-mismatch"):
        load_backbone(tmp_path / "w.safetensors", network)
    with pytest.raises(ConfigError, match="weights-missing"):
        load_backbone(tmp_path / "none.safetensors", network)
    save_weights(tmp_path / "w.safetensors", network, {"fit_groups": "g1"})
    with pytest.raises(ConfigError, match="weights-metadata"):
        load_backbone(tmp_path / "w.safetensors", network)
    with pytest.raises(ConfigError, match="last layer"):
        main_head(torch.nn.Sequential())

"""AMST end to end on drawn squares: what it trains on, what it never sees, planted label noise, empty sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from medaug.errors import ConfigError, DataError, LeakageError
from medaug.networks.amst import AuxiliaryHeads, feature_dimension
from medaug.networks.grading import build_network, penultimate
from medaug.networks.weights import save_weights
from medaug.training import amst as module
from medaug.training import amst_stages
from medaug.training.amst import Teacher, fit_amst, make_heads, stage_steps, teacher_from_checkpoint
from medaug.training.amst_recipe import AmstRecipe, amst_recipe
from medaug.training.amst_stages import Joined, frozen_statistics, pretrain, pretraining_loss, refresh
from medaug.training.classifier import ClassifierRecipe, LabelledImages, predict_logits, seeded

QUICK = ClassifierRecipe(num_steps=12, batch_size=8, learning_rate=3e-3, evaluate_every=6)


class Squares(Dataset[dict[str, Any]]):
    """A bright square whose size tells the class, on noise; some labels are another class's."""

    def __init__(self, count: int, seed: int, noise: float = 0.0, classes: int = 3) -> None:
        draw = np.random.default_rng(seed)
        self.truth = np.arange(count) % classes
        self.labels = np.where(draw.random(count) < noise, (self.truth + 1) % classes, self.truth)
        self.images = []
        for label in self.truth:
            image = 0.3 * draw.standard_normal((1, 16, 16)) - 0.5
            image[:, 4 : 6 + 3 * label, 4 : 6 + 3 * label] += 1
            self.images.append(torch.from_numpy(image.clip(-1, 1).astype(np.float32)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index]), "id": str(index)}


def fresh(classes: int = 3, name: str = "simple_cnn") -> torch.nn.Module:
    with seeded("fresh"):
        return build_network(name, classes, 1, 16)


def run(amst=None, recipe=QUICK, candidates=24, noise=0.0, **options):
    network = options.pop("network", None) or fresh()
    synthetic = Squares(candidates, 1, noise) if candidates else None
    result = fit_amst(network, Squares(12, 0), synthetic, Squares(9, 2), recipe, amst, key=("t",), **options)
    return network, result


def test_labels_beat_the_seeds_under_planted_noise_and_the_network_learns():
    recipe = ClassifierRecipe(num_steps=150, batch_size=16, learning_rate=3e-3, evaluate_every=50)
    network, synthetic, test = fresh(), Squares(60, 1, noise=0.3), Squares(60, 3)
    result = fit_amst(network, Squares(24, 0), synthetic, Squares(24, 2), recipe, AmstRecipe(quantile=0.7), key=("noise",))
    yes = result.labels.accepted
    assert 20 < yes.sum() < 60
    assert (result.labels.label == synthetic.truth)[yes].mean() > 0.95 > 0.8 > (synthetic.labels == synthetic.truth).mean()
    report = result.rounds[-1]
    assert report["labelled"] + report["unlabelled"] == 24 + 60 and report["accepted"] == yes.sum()
    assert report["relabelled"] > 5 and 0 < report["mean_lambda"] <= 1
    logits = predict_logits(network, test)
    assert (logits.argmax(1).numpy() == test.truth).mean() > 0.9
    assert set(network.state_dict()) == set(fresh().state_dict())  # nothing of the auxiliary heads is left


def test_same_key_gives_the_same_weights_whatever_the_global_state():
    first, one = run(AmstRecipe(quantile=0.5))
    torch.manual_seed(99)
    second, two = run(AmstRecipe(quantile=0.5))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert one.report() == two.report() and one.fit == two.fit


def test_steps_of_all_stages_add_up_to_the_recipe():
    for rounds, num_real in ((1, 12), (3, 20)):
        first, epoch, main = stage_steps(QUICK, AmstRecipe(rounds=rounds, pretraining_share=0.25), num_real)
        assert first + epoch * (rounds - 1) + sum(main) == 12 and len(main) == rounds
    assert stage_steps(QUICK, amst_recipe("amst-seed_label"), 12)[2] == [12]
    with pytest.raises(ConfigError, match="amst-too-few-steps"):
        stage_steps(QUICK, AmstRecipe(rounds=4), 40)


def test_stages_take_the_steps_they_should(monkeypatch):
    """Counted on the optimiser: stage 1, the refresh and stage 3 together make `num_steps`."""
    count = []
    original = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args, **options: count.append(1) or original(self, *args, **options)
    )
    _, result = run(AmstRecipe(rounds=2, quantile=0.5))
    assert len(count) == 12 and result.fit.history[-1]["step"] == 12 and len(result.rounds) == 2


def test_stage_one_is_equation_seven_and_leaves_the_main_head_alone():
    network = fresh()
    heads = make_heads(network, AmstRecipe(), 3, 1, 16, ("h",)).eval()
    features = {"weak": torch.randn(4, 128), "strong": torch.randn(4, 128)}
    target = torch.tensor([0, 1, 2, 0])
    cross_entropy = torch.nn.functional.cross_entropy
    by_hand = sum(cross_entropy(heads.heads[i](features[view]), target) for i, view in enumerate(heads.views))
    by_hand = by_hand + 0.5 * heads.penalty()
    torch.testing.assert_close(pretraining_loss(heads, features, target, 0.5), by_hand)

    before = {key: value.clone() for key, value in network.state_dict().items()}
    real = LabelledImages(Squares(12, 0))
    losses = pretrain(network, heads, real, QUICK, AmstRecipe(), 10, key=("p",))
    after = network.state_dict()
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert torch.equal(before["classifier.weight"], after["classifier.weight"])
    assert not torch.equal(before["features.0.weight"], after["features.0.weight"])
    middle = {key: value.clone() for key, value in after.items()}
    weight = heads.heads[0].weight.detach().clone()
    refresh(network, heads, real, QUICK, AmstRecipe(), 3, key=("r",))
    assert all(torch.equal(middle[key], value) for key, value in network.state_dict().items())
    assert not torch.equal(weight, heads.heads[0].weight)


def test_orthogonality_pushes_heads_of_one_view_apart():
    penalties = []
    for weight in (0.0, 1.0):
        network = fresh()
        heads = make_heads(network, AmstRecipe(), 3, 1, 16, ("h",))
        pretrain(network, heads, LabelledImages(Squares(12, 0)), QUICK, AmstRecipe(orthogonality=weight), 20, key=("p",))
        penalties.append(heads.penalty().item())
    assert penalties[1] < 0.5 * penalties[0]


def test_strong_views_do_not_enter_the_running_statistics():
    network = fresh().train()
    before = {key: value.clone() for key, value in network.state_dict().items() if "running" in key}
    with frozen_statistics(network):
        network(torch.randn(8, 1, 16, 16))
    assert all(torch.equal(before[key], network.state_dict()[key]) for key in before)
    network(torch.randn(8, 1, 16, 16))
    assert not any(torch.equal(before[key], network.state_dict()[key]) for key in before if "mean" in key)


def test_joined_sets_have_one_numbering():
    a, b = LabelledImages(Squares(4, 0)), LabelledImages(Squares(6, 1))
    joined = Joined(a, None, b)
    assert len(joined) == 10 and len(Joined(None)) == 0
    got = joined.batch(np.array([9, 0, 4, 3]))
    expected = torch.stack([b[5]["image"], a[0]["image"], b[0]["image"], a[3]["image"]])
    assert torch.equal(got, expected)


def test_real_labels_seed_labels_and_the_unlabelled_never_mix():
    """Seed labels decide nothing when AMST labels, unlabelled labels never; real ones stay what they are."""
    same = run(AmstRecipe(quantile=0.5), noise=0.0, unlabelled=Squares(6, 5))[0].state_dict()
    noisy = run(AmstRecipe(quantile=0.5), noise=0.9, unlabelled=Squares(6, 5, noise=0.9))[0].state_dict()
    assert all(torch.equal(same[key], noisy[key]) for key in same)
    seeds = run(amst_recipe("amst-seed_label"), noise=0.0)[0].state_dict()
    other = run(amst_recipe("amst-seed_label"), noise=0.9)[0].state_dict()
    assert not all(torch.equal(seeds[key], other[key]) for key in seeds)


def test_validation_only_picks_the_step():
    """Without validation the last weights stay; with it, labels and history of the training loss are the same."""
    network, synthetic = fresh(), Squares(24, 1)
    blind = fit_amst(network, Squares(12, 0), synthetic, None, QUICK, AmstRecipe(quantile=0.5), key=("t",))
    _, seeing = run(AmstRecipe(quantile=0.5))
    assert blind.rounds == seeing.rounds and blind.fit.best_macro_f1 is None and blind.fit.best_step == 12
    assert [entry["loss"] for entry in blind.fit.history] == [entry["loss"] for entry in seeing.fit.history]


@pytest.mark.parametrize(
    ("name", "labelled", "unlabelled"),
    [("amst-no_cr", None, None), ("amst-single_head", None, None), ("amst-soft_pseudo_label", 36, 0), ("amst-seed_label", 36, 0)],
)
def test_ablations(name, labelled, unlabelled, monkeypatch):
    built = []
    original = AuxiliaryHeads.__init__
    monkeypatch.setattr(
        AuxiliaryHeads, "__init__", lambda self, *args, **options: original(self, *args, **options) or built.append(self.views)
    )
    _, result = run(amst_recipe(name, {"quantile": 0.5}))
    report = result.rounds[0]
    if labelled is not None:
        assert (report["labelled"], report["unlabelled"]) == (labelled, unlabelled)
    else:
        assert report["labelled"] + report["unlabelled"] == 36 and report["unlabelled"] > 0
    assert (report["mean_lambda"] is None) == (name != "amst-single_head")
    assert built[0] == (("weak",) if name == "amst-single_head" else ("weak", "weak", "strong", "strong"))


def test_soft_labels_are_the_targets(monkeypatch):
    seen = []
    original = amst_stages.MainStep.__post_init__
    monkeypatch.setattr(amst_stages.MainStep, "__post_init__", lambda self: original(self) or seen.append(self.targets))
    _, result = run(amst_recipe("amst-soft_pseudo_label"))
    assert seen[0].shape == (36, 3)
    np.testing.assert_allclose(seen[0][12:].numpy(), result.labels.probs, atol=1e-6)
    assert torch.equal(seen[0][:12].argmax(1), torch.arange(12) % 3) and (seen[0][:12].max(1).values == 1).all()


def test_teacher_labels_and_those_it_is_unsure_of_stay_unlabelled():
    def predict(images):
        bright = (images[:, 0] > 0.2).float().mean((1, 2))
        label = (bright > 0.15).long() + (bright > 0.3).long()
        probs = torch.full((len(images), 3), 0.05)
        probs[torch.arange(len(images)), label] = 0.9
        probs[label == 1] = torch.tensor([0.25, 0.5, 0.25])
        return probs

    _, result = run(AmstRecipe(labels="teacher", teacher_confidence=0.8), teacher=Teacher(predict))
    assert set(result.labels.label[result.labels.accepted]) <= {0, 2} and not result.labels.accepted.all()
    assert result.rounds[0]["unlabelled"] == (~result.labels.accepted).sum() > 0
    with pytest.raises(ConfigError, match="teacher-missing"):
        run(AmstRecipe(labels="teacher"))
    with pytest.raises(ConfigError, match="each of 3 classes"):
        run(AmstRecipe(labels="teacher"), teacher=Teacher(lambda images: torch.full((len(images), 2), 0.5)))


def test_teacher_from_a_checkpoint(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "c", per_class=5, size=16)
    network = fresh()
    save_weights(tmp_path / "ok.safetensors", network)
    teacher = teacher_from_checkpoint(tmp_path / "ok.safetensors", "simple_cnn", cohort)
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(teacher.predict(x), torch.softmax(network.eval()(x), 1).detach())
    held_out = sorted(cohort.groups("test"))[0]
    save_weights(tmp_path / "leak.safetensors", network, {"fit_groups": f'["{held_out}"]'})
    with pytest.raises(LeakageError, match=held_out) as caught:
        teacher_from_checkpoint(tmp_path / "leak.safetensors", "simple_cnn", cohort)
    assert caught.value.exit_code == 4
    save_weights(tmp_path / "four.safetensors", fresh(4))
    with pytest.raises(ConfigError, match="weights-classes"):
        teacher_from_checkpoint(tmp_path / "four.safetensors", "simple_cnn", cohort)


def test_nothing_accepted_goes_on_and_says_so():
    _, result = run(AmstRecipe(threshold=0.0))
    assert result.rounds[0]["accepted"] == 0 and result.rounds[0]["unlabelled"] == 24
    assert [note.split(":")[0] for note in result.notes] == ["amst-none-accepted"]


def test_nothing_unlabelled_goes_on_with_the_first_loss_alone():
    flat = {"dropout": 0.0, "quantile": 1.0, "single_head": True}  # one head agrees with itself: everything is accepted
    with_cr, result = run(amst_recipe("amst", flat))
    assert result.rounds[0]["unlabelled"] == 0 and result.rounds[0]["mean_lambda"] is None
    assert [note.split(":")[0] for note in result.notes] == ["amst-none-unlabelled"]
    without, _ = run(amst_recipe("amst-no_cr", flat))
    assert all(torch.equal(a, b) for a, b in zip(with_cr.state_dict().values(), without.state_dict().values(), strict=True))


def test_no_synthetic_image_at_all():
    _, result = run(candidates=0)
    assert result.labels is None and result.rounds[0]["labelled"] == 12
    _, semi = run(candidates=0, unlabelled=Squares(10, 4))
    assert semi.rounds[0]["unlabelled"] == 10 and semi.rounds[0]["mean_lambda"] > 0


def test_classes_of_two_images_train():
    network = fresh()
    result = fit_amst(network, Squares(6, 0), Squares(6, 1), None, QUICK, AmstRecipe(quantile=0.5), key=("two",))
    assert np.isfinite([entry["loss"] for entry in result.fit.history]).all()


def test_class_missing_from_the_real_images_is_refused():
    with pytest.raises(DataError, match="none of class 2") as caught:
        fit_amst(fresh(), Squares(10, 0, classes=2), Squares(9, 1), None, QUICK, key=("x",))
    assert caught.value.code == "class-empty"


def test_divergence_has_a_sentence():
    wild = ClassifierRecipe(num_steps=12, batch_size=8, learning_rate=1e30, evaluate_every=6)
    with pytest.raises(ConfigError, match="training-diverged"):
        run(AmstRecipe(quantile=0.5), wild)


def test_options_of_stage_three():
    plain = run(AmstRecipe(quantile=0.5))[0].state_dict()
    for options in ({"reinitialise": True}, {"soft_target": True}, {"unlabelled_ratio": 0.5}):
        other = run(AmstRecipe(quantile=0.5, **options))[0].state_dict()
        assert not all(torch.equal(plain[key], other[key]) for key in plain), options
    balanced = ClassifierRecipe(num_steps=12, batch_size=8, learning_rate=3e-3, evaluate_every=6, class_balanced=True)
    assert run(AmstRecipe(quantile=0.5), balanced)[1].rounds[0]["scored"] == 24


def test_reinitialised_training_starts_from_the_first_weights(monkeypatch):
    seen = []
    original = module.MainStep.__call__

    def first_weights(self, step):
        if step == 0:
            seen.append({key: value.clone() for key, value in self.network.state_dict().items()})
        return original(self, step)

    monkeypatch.setattr(module.MainStep, "__call__", first_weights)
    run(AmstRecipe(quantile=0.5, reinitialise=True))
    assert all(torch.equal(seen[0][key], value) for key, value in fresh().state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_any_timm_backbone(name):
    with seeded("timm"):
        network = build_network(name, 3, 1, 16 if name == "test_resnet" else 32)
    if name == "test_vit":
        assert feature_dimension(network, 1, 32) == penultimate(network, torch.zeros(1, 1, 32, 32)).shape[1]
        return
    _, result = run(AmstRecipe(quantile=0.5), network=network)
    assert result.rounds[0]["scored"] == 24

"""AMST end to end on drawn squares: what it trains on, what it never sees, planted label noise, empty sets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from medaug.cohort import fit_sha256
from medaug.errors import ConfigError, DataError, LeakageError
from medaug.networks.amst import AuxiliaryHeads, fit_metadata
from medaug.networks.grading import build_network
from medaug.networks.weights import save_weights
from medaug.training import amst as module
from medaug.training import amst_stages
from medaug.training.amst import fit_amst, make_heads, stage_steps
from medaug.training.amst_recipe import AmstRecipe, amst_recipe
from medaug.training.amst_stages import Joined, MainStep, frozen_statistics, judging, pretrain, pretraining_loss, refresh
from medaug.training.classifier import ClassifierRecipe, LabelledImages, predict_logits, seeded
from medaug.training.softmatch import SoftMatch
from medaug.training.steps import EndlessOrder
from medaug.training.teacher import Teacher, check_origin, teacher_from_checkpoint
from medaug.transforms.views import Views


@pytest.fixture(autouse=True)
def one_thread():
    """On images of 16 pixels a second thread gains nothing, and on a busy machine it waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


QUICK = ClassifierRecipe(num_steps=12, batch_size=8, learning_rate=3e-3, evaluate_every=6)


class Squares(Dataset[dict[str, Any]]):
    """A bright square whose size tells the class, on noise; some labels are another class's."""

    def __init__(self, count: int, seed: int, noise: float = 0.0, classes: int = 3, size: int = 16) -> None:
        draw = np.random.default_rng(seed)
        self.truth = np.arange(count) % classes
        self.labels = np.where(draw.random(count) < noise, (self.truth + 1) % classes, self.truth)
        self.images = []
        for label in self.truth:
            image = 0.3 * draw.standard_normal((1, size, size)) - 0.5
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
    recipe = ClassifierRecipe(num_steps=100, batch_size=16, learning_rate=3e-3, evaluate_every=50)
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
    save_weights(tmp_path / "ok.safetensors", network, fit_metadata(cohort.groups("training")))
    teacher = teacher_from_checkpoint(tmp_path / "ok.safetensors", "simple_cnn", cohort)
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(teacher.predict(x), torch.softmax(network.eval()(x), 1).detach())
    held_out = sorted(cohort.groups("test"))[0]
    save_weights(tmp_path / "leak.safetensors", network, {"fit_groups": f'["{held_out}"]'})
    with pytest.raises(LeakageError, match=held_out) as caught:
        teacher_from_checkpoint(tmp_path / "leak.safetensors", "simple_cnn", cohort)
    assert caught.value.exit_code == 4
    assert teacher.content()["fit_on"] == fit_sha256(cohort.groups("training")) and not teacher.trusted
    save_weights(tmp_path / "elsewhere.safetensors", network)
    with pytest.raises(LeakageError, match="fit-unknown.*does not say"):
        teacher_from_checkpoint(tmp_path / "elsewhere.safetensors", "simple_cnn", cohort)
    vouched = teacher_from_checkpoint(tmp_path / "elsewhere.safetensors", "simple_cnn", cohort, trusted=True)
    assert vouched.trusted and vouched.content()["fit_groups"] is None
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
    size = 16 if name == "test_resnet" else 32
    with seeded("timm"):
        network = build_network(name, 3, 1, size)
    before = {key: value.clone() for key, value in network.named_parameters()}
    sets = [Squares(count, seed, size=size) for count, seed in ((12, 0), (12, 1), (9, 2))]
    result = fit_amst(network, *sets, QUICK, AmstRecipe(quantile=0.5), key=("timm",))
    assert result.rounds[0]["scored"] == 12 and result.rounds[0]["mean_lambda"] > 0
    still = [key for key, value in network.named_parameters() if torch.equal(before[key], value)]
    assert still == []  # every layer, the main head included, has learnt


def test_an_origin_is_known_unknown_or_held_out(tmp_path, make_cohort):
    cohort = make_cohort(tmp_path / "c", per_class=5, size=16)
    training = sorted(cohort.groups("training"))
    assert not check_origin(training, cohort, "it") and not check_origin((), cohort, "it")
    for groups in (None, [*training, "of-another-cohort"]):
        with pytest.raises(LeakageError, match="fit-unknown") as caught:
            check_origin(groups, cohort, "it")
        assert caught.value.exit_code == 4
        assert check_origin(groups, cohort, "it", trusted=True)
    with pytest.raises(LeakageError, match="fit-on-held-out"):  # a word does not undo what is known
        check_origin([sorted(cohort.groups("test"))[0]], cohort, "it", trusted=True)


def views_of(batch: torch.Tensor, keys: list) -> dict[str, torch.Tensor]:
    return {"plain": batch, "weak": Views().weak(batch, keys), "strong": Views().strong(batch, keys)}


def names_of(seen: torch.Tensor, views: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, images in views.items() if images.shape == seen.shape and torch.equal(images, seen)]


def watched(network, monkeypatch) -> list[tuple[torch.Tensor, bool, bool]]:
    """Whatever goes through the backbone from now on: the images, training mode, gradient."""
    seen = []
    original = network.forward_features
    monkeypatch.setattr(
        network,
        "forward_features",
        lambda x: seen.append((x.detach().clone(), network.training, torch.is_grad_enabled())) or original(x),
    )
    return seen


@pytest.mark.parametrize("stage", [pretrain, refresh])
def test_each_auxiliary_head_learns_from_its_own_view(stage, monkeypatch):
    """Stage 1 and the refresh: two views of the same images; heads of the weak view get its features, strong ones theirs."""
    network, real = fresh(), LabelledImages(Squares(12, 0))
    heads = make_heads(network, AmstRecipe(), 3, 1, 16, ("h",))
    seen, features = watched(network, monkeypatch), {}
    original, amst_stages_penultimate = heads.logits, amst_stages.penultimate
    outputs = []
    monkeypatch.setattr(amst_stages, "penultimate", lambda *given: outputs.append(amst_stages_penultimate(*given)) or outputs[-1])
    monkeypatch.setattr(heads, "logits", lambda view, given: features.update({view: given}) or original(view, given))
    stage(network, heads, real, QUICK, AmstRecipe(), 1, key=("p",))
    plain, _ = real.batch(EndlessOrder(np.arange(12), ("p", "real")).take(0, 8))
    expected = views_of(plain, [("p", "view", 0, position) for position in range(8)])
    assert [names_of(images, expected) for images, _, _ in seen] == [["weak"], ["strong"]]
    assert features["weak"] is outputs[0] and features["strong"] is outputs[1]
    assert [(training, gradient) for _, training, gradient in seen] == [(stage is pretrain, stage is pretrain)] * 2


def main_step(network, num_steps=4):
    pool = Joined(LabelledImages(Squares(12, 0)), LabelledImages(Squares(12, 1)))
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    labelled, rest = np.arange(12), np.arange(12, 24)
    targets = torch.from_numpy(np.arange(24) % 3)
    step = MainStep(
        network, optimiser, pool, lambda s: labelled[:8], targets, rest, QUICK, AmstRecipe(), num_steps, num_steps, ("m",)
    )
    order = EndlessOrder(rest, ("m", "unlabelled"))
    return step, pool.batch(labelled[:8]), lambda s: pool.batch(order.take(8 * s, 8))


def test_stage_three_shows_every_part_its_own_view_in_its_own_mode(monkeypatch):
    """Labelled: weak, in training. Unlabelled: weak, without drop-out and gradient, then strong, in training."""
    network = fresh()
    step, labelled, unlabelled = main_step(network)
    seen = watched(network, monkeypatch)
    step(0)
    known = views_of(labelled, [("m", "labelled", 0, position) for position in range(8)])
    rest = views_of(unlabelled(0), [("m", "unlabelled", 0, position) for position in range(8)])
    assert names_of(seen[0][0], known) == ["weak"]
    assert [names_of(images, rest) for images, _, _ in seen[1:]] == [["weak"], ["strong"]]
    assert [(training, gradient) for _, training, gradient in seen] == [(True, True), (False, False), (True, True)]
    assert (step.image_passes, step.forward_passes) == (16, 8)


def test_every_stage_trains_at_the_precision_of_the_recipe():
    network = fresh()
    seen = []
    network.features[0].register_forward_hook(lambda module, inputs, output: seen.append((torch.is_grad_enabled(), output.dtype)))
    pool = LabelledImages(Squares(12, 0))
    recipe = replace(QUICK, precision="bfloat16")
    heads = make_heads(network, AmstRecipe(), 3, 1, 16, ("p",))
    seen.clear()  # of the look at the network's size
    pretrain(network, heads, pool, recipe, AmstRecipe(), 1, key=("p",))
    assert seen and {dtype for _, dtype in seen} == {torch.bfloat16}
    seen.clear()
    step, _, _ = main_step(network)
    step.recipe = recipe
    step(0)
    assert {dtype for _, dtype in seen} == {torch.bfloat16} and {gradient for gradient, _ in seen} == {True, False}


def running(network) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items() if "running" in key}


def test_only_the_labelled_batch_moves_the_running_statistics():
    """One step of stage 3 leaves the statistics that the labelled batch alone leaves; in stage 1, the weak view alone."""
    network, alone = fresh(), fresh()
    step, labelled, _ = main_step(network)
    step(0)
    alone.train()(Views().weak(labelled, [("m", "labelled", 0, position) for position in range(8)]))
    for key, value in running(alone).items():
        torch.testing.assert_close(running(network)[key], value, msg=key)
    assert not torch.equal(running(network)["features.1.running_mean"], running(fresh())["features.1.running_mean"])

    network, alone, real = fresh(), fresh(), LabelledImages(Squares(12, 0))
    pretrain(network, make_heads(network, AmstRecipe(), 3, 1, 16, ("h",)), real, QUICK, AmstRecipe(), 1, key=("p",))
    plain, _ = real.batch(EndlessOrder(np.arange(12), ("p", "real")).take(0, 8))
    alone.train()(Views().weak(plain, [("p", "view", 0, position) for position in range(8)]))
    for key, value in running(alone).items():
        torch.testing.assert_close(running(network)[key], value, msg=key)


def test_targets_of_the_consistency_do_not_follow_running_statistics_that_trail():
    """What a step learns depends on its batches alone, however far behind the running statistics are."""
    losses = []
    for lag in (0.0, 50.0):
        network = fresh()
        for key, value in network.state_dict().items():
            if "running_mean" in key:
                value += lag
        losses.append(main_step(network)[0](0))
        assert network.training and all(module.training for module in network.modules())
    assert losses[0] == losses[1]


def test_judging_drops_nothing_and_leaves_the_network_as_it_was():
    network = fresh().train()
    network.features[4].eval()  # a part that someone froze
    before, x = running(network), torch.randn(8, 1, 16, 16)
    with judging(network):
        first, second = network(x), network(x)
    assert torch.equal(first, second) and network.training and not network.features[4].training
    torch.testing.assert_close(running(network), before)


def test_a_round_has_one_softmatch_that_remembers(monkeypatch):
    made, called = [], []
    original, call = SoftMatch.__init__, SoftMatch.__call__
    monkeypatch.setattr(
        SoftMatch, "__init__", lambda self, *args, **options: original(self, *args, **options) or made.append(self)
    )
    monkeypatch.setattr(SoftMatch, "__call__", lambda self, probs: called.append((self, self.mean)) or call(self, probs))
    step, _, _ = main_step(fresh(), num_steps=20)
    made.clear()
    for index in range(4):
        step(index)
    assert len(made) == 1 and {id(owner) for owner, _ in called} == {id(made[0])}
    means = [mean for _, mean in called]
    assert means[0] == pytest.approx(1 / 3) and len(set(means)) == 4  # every step goes on from the last
    called.clear()
    run(AmstRecipe(quantile=0.5, rounds=2))
    assert len({id(owner) for owner, _ in called}) == 2  # and every round starts anew


def test_weights_tell_images_apart_in_a_short_run_and_the_papers_momentum_is_noted():
    """With 0.999 the variance stays near its start of 1 for hundreds of steps, and every weight near 1."""
    recipe = ClassifierRecipe(num_steps=70, batch_size=8, learning_rate=3e-3, evaluate_every=70)
    _, short = run(AmstRecipe(quantile=0.5), recipe)
    report = short.rounds[-1]
    assert report["min_lambda"] < 0.5 and report["min_lambda"] < report["mean_lambda"] < 0.99
    assert not any("amst-softmatch-inert" in note for note in short.notes)
    _, paper = run(AmstRecipe(quantile=0.5, momentum=0.999), recipe)
    assert paper.rounds[-1]["mean_lambda"] > 0.99
    assert [note for note in paper.notes if note.startswith("amst-softmatch-inert") and "plain pseudo-labelling" in note]


def test_unlabelled_images_that_are_already_there_are_left_out():
    real, candidates, new = Squares(12, 0), Squares(24, 1), Squares(5, 9)
    mixed = torch.utils.data.ConcatDataset([real, new, torch.utils.data.Subset(candidates, [3, 4])])
    _, result = run(AmstRecipe(quantile=0.5), unlabelled=mixed)
    _, clean = run(AmstRecipe(quantile=0.5), unlabelled=new)
    assert result.repeated == 12 + 2 and result.report()["unlabelled_repeated"] == 14
    assert any(note.startswith("amst-unlabelled-repeated: 14 ") for note in result.notes)
    assert result.rounds == clean.rounds and clean.repeated == 0
    _, nothing = run(amst_recipe("amst-seed_label"), unlabelled=candidates)
    assert nothing.rounds[0]["unlabelled"] == 0 and nothing.repeated == 24


def test_image_passes_are_what_went_through_the_backbone(monkeypatch):
    network = fresh()
    seen = watched(network, monkeypatch)
    amst = AmstRecipe(rounds=2, quantile=0.5, pretraining_share=0.25)
    result = fit_amst(network, Squares(12, 0), Squares(24, 1), None, QUICK, amst, key=("t",))
    with_gradient = sum(len(images) for images, _, gradient in seen if gradient)
    without = sum(len(images) for images, _, gradient in seen if not gradient)
    assert result.image_passes == with_gradient == 3 * 16 + 7 * 16
    assert result.forward_passes == without - 1 == 2 * 24 + 2 * 16 + 7 * 8  # the one finds the length of the features

"""The classifier's trainer: keyed, fixed steps, best weights by validation."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn
from torch.utils.data import Dataset

from medaug.draws import numpy_generator
from medaug.errors import ConfigError, DataError
from medaug.training import classifier, steps
from medaug.training.classifier import (
    ClassifierRecipe,
    LabelledImages,
    confusion_counts,
    fit_classifier,
    macro_f1,
    predict_logits,
    seeded,
)


class Stripes(Dataset):
    """Class 0: bright upper half, class 1: bright lower half, under noise; counts how often an image is read."""

    def __init__(self, count: int, key: str = "train", noise: float = 0.3) -> None:
        self.count, self.key, self.noise, self.reads = count, key, noise, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        self.reads += 1
        label = index % 2
        image = np.zeros((1, 8, 8), dtype=np.float32)
        image[:, 4 * label : 4 * label + 4] = 0.5
        image += self.noise * numpy_generator("stripes", self.key, index).standard_normal(image.shape).astype(np.float32)
        return {"image": torch.from_numpy(image.clip(-1, 1)), "label": label, "id": str(index)}


def small_network(*key: object) -> nn.Module:
    with seeded(*key):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 2)
        )


def fit(key=("k", 0), policy="weak", **options):
    network = small_network(*key, "init")
    recipe = ClassifierRecipe(**({"num_steps": 25, "batch_size": 8, "evaluate_every": 10, "policy": policy} | options))
    result = fit_classifier(network, Stripes(24), Stripes(20, "validation"), recipe, key=key)
    return network, result


def test_learns_a_planted_signal():
    network, result = fit(num_steps=60)
    logits = predict_logits(network, Stripes(40, "test"), batch_size=7)
    assert (logits.argmax(1).numpy() == np.arange(40) % 2).mean() > 0.9
    assert result.best_macro_f1 > 0.9
    assert [entry["step"] for entry in result.history] == [10, 20, 30, 40, 50, 60]


def test_same_key_same_weights_whatever_the_global_state():
    torch.manual_seed(1)
    first, result = fit()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, again = fit()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first.state_dict()[name], value) for name, value in second.state_dict().items())
    assert result == again
    third, _ = fit(key=("k", 1))
    assert not torch.equal(first[0].weight, third[0].weight)


@pytest.mark.parametrize(
    "option",
    [
        {"policy": "none"},
        {"batch_size": 12},
        {"class_balanced": True, "label_smoothing": 0.1},
        {"learning_rate": 0.01},
        {"precision": "bfloat16"},
    ],
)
def test_options_are_not_silently_ignored(option):
    assert not torch.equal(fit()[0][0].weight, fit(**option)[0][0].weight)


def test_mixed_precision_learns_too_keeps_weights_of_32_bits_and_repeats():
    network, result = fit(num_steps=60, precision="bfloat16")
    again, _ = fit(num_steps=60, precision="bfloat16")
    assert result.best_macro_f1 > 0.9
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    assert torch.equal(network[0].weight, again[0].weight)
    assert predict_logits(network, Stripes(4, "test")).dtype == torch.float32
    losses = [entry["loss"] for entry in result.history], [entry["loss"] for entry in fit(num_steps=60)[1].history]
    np.testing.assert_allclose(*losses, atol=0.05)  # the same training but for rounding


def test_precision_of_the_forward_pass_is_what_the_recipe_says():
    seen = []
    network = small_network("p")
    network[0].register_forward_hook(lambda module, inputs, output: seen.append((module.training, output.dtype)))
    recipe = ClassifierRecipe(num_steps=2, batch_size=4, precision="bfloat16")
    fit_classifier(network, Stripes(8), Stripes(8, "validation"), recipe, key=("p",))
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}  # scores are taken in 32 bits


def test_unknown_precision_and_a_processor_without_it_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="float32, bfloat16.*'half'"):
        ClassifierRecipe(num_steps=2, precision="half")
    monkeypatch.setattr(steps, "_fast_bfloat16", lambda: False)
    steps.check_precision("float32", "cpu")
    steps.check_precision("bfloat16", "cuda")
    with pytest.raises(ConfigError, match="precision-slow.*--precision float32"):
        steps.check_precision("bfloat16", "cpu")


def test_cache_and_lazy_reading_train_the_same_weights(monkeypatch):
    cached, _ = fit()
    monkeypatch.setattr(classifier.LabelledImages.__init__, "__kwdefaults__", {"cache_bytes": 0})
    lazy, _ = fit()
    assert torch.equal(cached[0].weight, lazy[0].weight)


def test_small_data_set_is_read_once():
    data = Stripes(24)
    fit_classifier(small_network("a"), data, None, ClassifierRecipe(num_steps=30, batch_size=8), key=("a",))
    assert data.reads == 25  # one for the shape


def test_labelled_images_keep_sixteen_bits_and_select_shares_them():
    values = torch.arange(64, dtype=torch.float32).reshape(1, 8, 8) * 997 / 65535 * 2 - 1

    class One(Stripes):
        def __getitem__(self, index):
            return {"image": values, "label": index, "id": ""}

    images = LabelledImages(One(3))
    assert torch.allclose(images.batch([0])[0][0], values, atol=1e-6)  # float32 rounding of k / 65535
    view = images.select([2, 2, 0])
    assert len(view) == 3 and view.labels().tolist() == [2, 2, 0] and view.batch([1])[1].tolist() == [2]
    assert view.select([2]).labels().tolist() == [0]
    assert LabelledImages(One(3), cache_bytes=0).select([2, 1]).labels().tolist() == [2, 1]


def test_every_epoch_is_a_permutation_and_batches_are_full():
    recipe = ClassifierRecipe(num_steps=1, batch_size=4)
    batch = classifier.batch_indices(10, recipe, ("k",), None)
    order = np.concatenate([batch(step) for step in range(5)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    assert np.array_equal(classifier.batch_indices(10, recipe, ("k",), None)(3), order[12:16])  # any step without the ones before


def test_real_share_holds_in_every_batch():
    synthetic = np.arange(40) >= 4
    batch = classifier.batch_indices(40, ClassifierRecipe(num_steps=1, batch_size=8, real_share=0.5), ("k",), synthetic)
    for step in range(6):
        assert (~synthetic[batch(step)]).sum() == 4
    natural = classifier.batch_indices(40, ClassifierRecipe(num_steps=1, batch_size=8), ("k",), synthetic)
    assert (~synthetic[np.concatenate([natural(step) for step in range(5)])]).sum() == 4


def test_rate_warms_up_and_falls_to_nearly_nothing():
    recipe = ClassifierRecipe(num_steps=100, warmup_fraction=0.1)
    rates = [classifier.rate_factor(step, recipe) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001


def test_best_weights_win_and_ties_go_to_the_later(monkeypatch):
    scores = iter([0.5, 0.9, 0.9, 0.2])
    monkeypatch.setattr(classifier, "macro_f1", lambda counts: next(scores))
    seen = []
    network = small_network("a")
    recipe = ClassifierRecipe(num_steps=8, batch_size=4, evaluate_every=2)
    result = fit_classifier(
        network,
        Stripes(12),
        Stripes(6),
        recipe,
        key=("a",),
        on_eval=lambda entry: seen.append((entry["step"], network[0].weight.detach().clone())),
    )
    assert result.best_step == 6 and [step for step, _ in seen] == [2, 4, 6, 8]
    assert torch.equal(network[0].weight, seen[2][1]) and not torch.equal(network[0].weight, seen[3][1])


def test_macro_f1_equals_scikit_learn():
    generator = np.random.default_rng(0)
    for _ in range(20):
        target, preds = generator.integers(0, 4, (2, 9))
        assert macro_f1(confusion_counts(target, preds, 5)) == pytest.approx(f1_score(target, preds, average="macro"))


def test_prediction_does_not_change_the_mode_or_depend_on_the_batch():
    network = small_network("a")
    network.train()
    assert torch.allclose(predict_logits(network, Stripes(9), 2), predict_logits(network, Stripes(9), 9), atol=1e-6)
    assert network.training


def test_refusals():
    with pytest.raises(DataError, match="training-empty"):
        fit_classifier(small_network("a"), Stripes(0), None, ClassifierRecipe(num_steps=1), key=("a",))
    with pytest.raises(ConfigError, match="none, crop_rotate, weak"):
        ClassifierRecipe(num_steps=1, policy="mixup")
    for wrong in ({"num_steps": 0}, {"learning_rate": 0}, {"real_share": 0}, {"warmup_fraction": 1}, {"weight_decay": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ClassifierRecipe(**({"num_steps": 1} | wrong))
    network = small_network("a")
    with torch.no_grad():
        network[0].weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="training-diverged"):
        fit_classifier(network, Stripes(8), None, ClassifierRecipe(num_steps=1), key=("a",))

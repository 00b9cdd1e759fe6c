"""Decoded images of a comparison: the values of a plain reading, one file per cohort, whole or absent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medaug.errors import MedaugError
from medaug.grading import images
from medaug.grading.images import GradedImages, decoded
from medaug.training.classifier import LabelledImages
from medaug.training.data import CaseImages


@pytest.mark.parametrize("channels", [1, 3])
def test_values_and_labels_are_those_of_a_plain_reading(tmp_path, make_cohort, make_synthetic, channels):
    real = make_cohort(tmp_path / "real", channels=channels)
    other = make_cohort(tmp_path / "other", channels=channels, seed=1)
    graded = GradedImages(real, tmp_path / "cache")
    pairs = [(real, case) for case in real.training] + [(other, case) for case in other.training] + [(real, real.training[0])]
    ours = graded.training(pairs)
    plain = [LabelledImages(CaseImages(owner, [case])).batch([0]) for owner, case in pairs]
    x, target = ours.batch(range(len(pairs)))
    assert torch.equal(x, torch.cat([image for image, _ in plain]))
    assert torch.equal(target, torch.cat([label for _, label in plain]))
    assert ours.labels().tolist() == target.tolist()
    part = ours.select([5, 3]).select([1])
    assert torch.equal(part.batch([0])[0][0], x[3]) and len(part) == 1
    assert torch.equal(graded.split("test").batch([0])[0], LabelledImages(CaseImages(real, real.test)).batch([0])[0])


def test_a_cohort_is_decoded_once(tmp_path, make_cohort, monkeypatch):
    real = make_cohort(tmp_path / "real")
    first = decoded(real, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{real.content_sha256}.npy"]
    assert isinstance(first, np.memmap) and not first.flags.writeable

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(images, "_decode", refuse)
    assert np.array_equal(decoded(real, tmp_path / "cache"), first)
    assert GradedImages(real, tmp_path / "cache").split("training") is not None


def test_a_failed_decoding_leaves_nothing(tmp_path, make_cohort):
    real = make_cohort(tmp_path / "real")
    real.path(real.test[0]).unlink()
    with pytest.raises((MedaugError, OSError)):
        decoded(real, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []

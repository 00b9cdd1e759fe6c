from __future__ import annotations

import numpy as np
import pytest

from medaug import storage
from medaug.errors import DataError
from medaug.io.npz import read_medmnist


def write(path, **changes):
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = draw.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = draw.integers(0, 3, (count, 1), dtype=np.uint8)
    arrays |= changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez_compressed(path, **arrays)
    return arrays


def test_every_image_comes_with_its_split_and_label(tmp_path):
    arrays = write(tmp_path / "a.npz")
    read = list(read_medmnist(tmp_path / "a.npz"))
    assert [split for split, _, _ in read] == ["training"] * 5 + ["validation"] * 2 + ["test"] * 3
    assert [label for _, label, _ in read[:5]] == arrays["train_labels"][:, 0].tolist()
    np.testing.assert_array_equal(read[6][2].pixels, arrays["val_images"][1])
    assert read[6][2].unit == "uint8"
    assert read[6][2].source == storage.sha256_bytes(arrays["val_images"][1].tobytes())


def test_colour_with_equal_channels_becomes_grey(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    write(tmp_path / "a.npz", train_images=np.repeat(grey[..., None], 3, axis=3), val_images=np.zeros((2, 8, 8, 1), np.uint8))
    read = list(read_medmnist(tmp_path / "a.npz"))
    np.testing.assert_array_equal(read[0][2].pixels, grey[0])
    assert read[5][2].pixels.shape == (8, 8)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"train_labels": None}, "archive-malformed"),
        ({"train_labels": np.zeros((5, 14), int)}, "label-invalid"),
        ({"train_labels": np.zeros((5, 1))}, "label-invalid"),
        ({"train_labels": np.full((5, 1), -1)}, "label-invalid"),
        ({"train_labels": np.zeros((4, 1), int)}, "archive-malformed"),
        ({"train_images": np.zeros((5, 8, 8))}, "archive-malformed"),
        ({"train_images": np.zeros((5, 8, 8, 8), np.uint8)}, "archive-malformed"),
        ({"train_images": np.array([{}] * 5)}, "archive-malformed"),
        ({"train_images": np.asfortranarray(np.zeros((5, 8, 8), np.uint8))}, "archive-malformed"),
        ({"train_images": np.zeros((5, 0, 8), np.uint8)}, "shape-invalid"),
    ],
)
def test_refusals_come_before_the_first_image(tmp_path, changes, code):
    write(tmp_path / "a.npz", **changes)
    with pytest.raises(DataError) as caught:
        read_medmnist(tmp_path / "a.npz")
    assert caught.value.code == code


def test_other_archives_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="none of train_images"):
        read_medmnist(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"PK no archive")
    with pytest.raises(DataError, match="archive-unreadable"):
        read_medmnist(tmp_path / "b.npz")


def test_header_that_promises_more_than_the_member_holds(tmp_path):
    import zipfile

    write(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["train_images.npy"] = members["train_images.npy"][:-9]
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(DataError, match="image-truncated"):
        read_medmnist(tmp_path / "b.npz")


@pytest.mark.parametrize("cut", [30, 300, 700, -5])
def test_truncated_archive(tmp_path, cut):
    write(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:cut])
    with pytest.raises(DataError):
        list(read_medmnist(tmp_path / "a.npz"))

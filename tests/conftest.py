"""Shared fixtures: tiny drawn cohorts, no patient, no network."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from medaug import cohort as cohorts
from medaug.cohort import Case, Cohort
from medaug.draws import numpy_generator


@pytest.fixture(scope="session", autouse=True)
def pseudonym_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A known key for pseudonyms, so that tests leave the user's own alone and make the same bytes every time."""
    path = tmp_path_factory.mktemp("key") / "pseudonym.key"
    path.write_text("00112233445566778899aabbccddeeff" * 2 + "\n")
    path.chmod(0o600)
    before = os.environ.get("MEDAUG_PSEUDONYM_KEY")
    os.environ["MEDAUG_PSEUDONYM_KEY"] = str(path)
    yield path
    if before is None:
        del os.environ["MEDAUG_PSEUDONYM_KEY"]
    else:
        os.environ["MEDAUG_PSEUDONYM_KEY"] = before


def draw_shape(label: int, size: int, *key: object) -> np.ndarray:
    """A disc whose radius and brightness tell the class, on noise: unit image (size, size)."""
    draw = numpy_generator("shape", label, *key)
    y, x = np.mgrid[:size, :size] / size
    cx, cy = draw.uniform(0.35, 0.65, 2)
    radius = 0.1 + 0.08 * label
    disc = ((x - cx) ** 2 + (y - cy) ** 2) < radius**2
    image = 0.2 + 0.05 * draw.standard_normal((size, size)) + disc * (0.3 + 0.1 * label)
    return image.clip(0, 1).astype(np.float32)


@pytest.fixture(scope="session")
def make_cohort() -> Callable[..., Cohort]:
    """Build a small valid cohort folder: drawn discs, groups of `cases_per_group`, split 60/20/20 by group."""
    from medaug.io.raster import write_unit_png

    def make(
        root: Path,
        *,
        num_classes: int = 3,
        per_class: int = 12,
        size: int = 16,
        channels: int = 1,
        seed: int = 0,
        cases_per_group: int = 2,
        ordinal: bool = False,
    ) -> Cohort:
        splits: dict[str, list[Case]] = {split: [] for split in cohorts.SPLITS}
        for label in range(num_classes):
            for index in range(per_class):
                image = draw_shape(label, size, seed, index)
                image = np.repeat(image[..., None], 3, axis=2) if channels == 3 else image
                case_id = f"c{seed}{label}{index:04d}"
                write_unit_png(root / "images" / f"{case_id}.png", image)
                group = index // cases_per_group
                share = group / (per_class / cases_per_group)
                split = "training" if share < 0.6 else "validation" if share < 0.8 else "test"
                case = Case(
                    id=case_id,
                    image=f"images/{case_id}.png",
                    label=label,
                    group=f"g{label}{group:03d}",
                    source=f"{seed:02d}{label:02d}{index:060d}",
                )
                splits[split].append(case)
        made = Cohort(
            name="discs",
            modality="",
            classes=tuple(f"class{label}" for label in range(num_classes)),
            ordinal=ordinal,
            image_size=size,
            channels=channels,
            intensity={"kind": "drawn", "0": 0, "1": 1},
            created_by=cohorts.created_by("test", {}, seed),
        )
        return cohorts.write_cohort(made.with_cases(**splits), root)

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first: handed out file by file, a long one must not be the last that a process takes up."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])

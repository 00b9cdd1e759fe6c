"""The copies check on drawn discs: changed copies, seeds and other patients, each by its own rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medaug.cohort import Case, Cohort
from medaug.errors import ConfigError, DataError
from medaug.export.plan import COPY_REASONS, check_exportable
from medaug.io.raster import read_unit_png, write_unit_png
from medaug.quality.context import GateContext
from medaug.quality.copy_check import NEAR_COPY, SEED_COPY, copies
from medaug.quality.copy_pictures import write_copy_pictures
from medaug.quality.copy_ruler import near_in
from medaug.quality.feature_cache import FeatureCache
from medaug.quality.seeds import seed_of
from medaug.quality.verdicts import combine

SEEDED = {"inversion": {"name": "ddim"}}


@pytest.fixture(scope="module")
def real(tmp_path_factory, make_cohort: Callable[..., Cohort]) -> Cohort:
    return make_cohort(tmp_path_factory.mktemp("real"), per_class=100, cases_per_group=1, size=32)


@pytest.fixture
def context(real: Cohort, tmp_path: Path) -> GateContext:
    return GateContext(real, replace(real, root=tmp_path), tmp_path / "filter", 0.8)


def make(context: GateContext, name: str, image: np.ndarray, reference: Case, **lineage: object) -> Case:
    write_unit_png(context.synthetic.root / f"{name}.png", np.ascontiguousarray(image.clip(0, 1), dtype=np.float32))
    return replace(reference, id=name, image=f"{name}.png", lineage={"reference": reference.id, **lineage})


def test_changed_copies_are_caught_and_new_images_are_not(context, real, make_cohort, tmp_path):
    others = make_cohort(tmp_path / "others", per_class=12, size=32, seed=1)
    some = real.training[::18]
    changes = {
        "same": lambda x: x,
        "mirror": lambda x: x[:, ::-1],
        "moved": lambda x: np.roll(x, 1, 0),
        "pale": lambda x: 0.9 * x,
    }
    cases = [
        make(context, f"{name}{index}", change(read_unit_png(real.path(case))), case)
        for name, change in changes.items()
        for index, case in enumerate(some)
    ]
    findings = copies(context, cases)
    assert [case.id for case, finding in zip(cases, findings, strict=True) if finding.verdict == "accept"] == []
    assert all(finding.reasons[-1][0] == NEAR_COPY for finding in findings)
    assert all(
        finding.lineage["nearest_by_space"]["pixels"]["case"] == case.lineage["reference"]
        for case, finding in zip(cases, findings, strict=True)
    )
    assert context.reports["near_copies"]["rate"] == 1
    assert context.reports["closeness"]["p"] < 1e-4  # features of positions, so only the unmoved ones count
    new = [make(context, f"new{i}", read_unit_png(others.path(case)), real.training[0]) for i, case in enumerate(others.cases())]
    honest = copies(context, new)
    assert sum(finding.verdict != "accept" for finding in honest) <= 3  # of 36, at a percent or two each


def test_a_variation_is_measured_against_its_seed_by_weak_copies(context, real, make_cohort, tmp_path):
    seed, far = real.training[0], real.training[150]  # of another class
    new = make_cohort(tmp_path / "new", per_class=4, size=32, seed=1)
    image = read_unit_png(real.path(seed))
    copy = make(context, "copy", image, seed, **SEEDED)
    varied = make(context, "varied", read_unit_png(new.path(new.training[-1])), seed, **SEEDED)
    other = make(context, "other", read_unit_png(real.path(far)), seed, **SEEDED)
    findings = copies(context, [copy, varied, other])
    assert [code for code, _ in findings[0].reasons].count(SEED_COPY) == 2  # in either space
    assert findings[0].lineage["seed_distance"] == 0
    assert findings[0].lineage["nearest_training_case"] != seed.id  # of another patient
    assert SEED_COPY not in [code for code, _ in findings[1].reasons] and findings[1].lineage["seed_distance"] > 0
    assert [code for code, _ in findings[2].reasons] == [NEAR_COPY, NEAR_COPY]
    plain = copies(context, [replace(copy, lineage={"reference": seed.id})])  # only conditioned on the image
    assert [code for code, _ in plain[0].reasons] == [NEAR_COPY, NEAR_COPY]
    with pytest.raises(ConfigError, match="were generated from"):
        copies(context, [replace(copy, lineage={"reference": "unknown", **SEEDED})])


def test_who_has_a_seed(real):
    case = real.training[0]
    assert seed_of(replace(case, lineage={"reference": "a"})) is None
    assert seed_of(replace(case, lineage={"reference": "a", **SEEDED})) == "a"
    assert seed_of(replace(case, lineage={"reference": "a", "source": {"kind": "real", "case": "b"}})) == "b"
    assert seed_of(replace(case, lineage={"reference": "a", "source": {"kind": "generated"}})) is None


def test_ratio_leaves_the_own_and_the_nearest_group_out():
    training = np.array([[1, 0], [0.99, 0.1], [0, 1.0], [-1, 0]])
    x = np.array([[1, 0.01]])
    near = near_in(training, ["a", "a", "b", "c"], x)
    assert near.index[0] == 0 and near.second[0] == pytest.approx(np.linalg.norm(x / np.linalg.norm(x) - [0, 1]))
    assert near.ratio[0] == pytest.approx(near.distance[0] / near.second[0])
    passed = near_in(training, ["a", "a", "b", "c"], x, ["a"])
    assert passed.index[0] == 2 and passed.second[0] == pytest.approx(np.linalg.norm(x / np.linalg.norm(x) - [-1, 0]))


def test_pairs_are_pictured_and_old_ones_go(context, real, tmp_path):
    case = make(context, "copy", read_unit_png(real.path(real.training[3])), real.training[3])
    verdict = combine(case, copies(context, [case]))
    write_copy_pictures(tmp_path / "out", real, context.synthetic, [verdict])
    pair = read_unit_png(tmp_path / "out" / "copies" / "copy.png")
    np.testing.assert_allclose(pair[2:34, 2:34], pair[2:34, 36:68], atol=1e-4)
    write_copy_pictures(tmp_path / "out", real, context.synthetic, [])
    assert list((tmp_path / "out" / "copies").glob("*.png")) == []


def test_features_are_computed_once_per_image(context, real, tmp_path):
    cache = FeatureCache(tmp_path / "features")
    extractor = context.extractor("random_conv")
    first = cache.features(extractor, real, real.training[:20])
    again = FeatureCache(tmp_path / "features")
    np.testing.assert_array_equal(again.features(extractor, real, real.training[10:30])[:10], first[10:])
    assert (cache.computed, again.computed) == (20, 10)
    (path,) = (tmp_path / "features").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    mended = FeatureCache(tmp_path / "features")
    np.testing.assert_array_equal(mended.features(extractor, real, real.training[:20]), first)
    assert mended.computed == 20


def test_export_refuses_copies_whatever_is_allowed(real):
    assert COPY_REASONS == (NEAR_COPY, SEED_COPY)
    lineage = {"verdict": "quarantine", "reasons": [NEAR_COPY]}
    cohort = replace(real, training=(replace(real.training[0], lineage=lineage),), validation=(), test=())
    with pytest.raises(DataError, match="export-copy.*1 of 1"):
        check_exportable(cohort, allow_ungated=True)


def test_wrong_settings_are_refused(context, real):
    with pytest.raises(ConfigError, match="pixels, random_conv, task"):
        copies(context, [real.training[0]], spaces=["unknown"])
    with pytest.raises(ConfigError, match="list of spaces"):
        copies(context, [real.training[0]], spaces=[])

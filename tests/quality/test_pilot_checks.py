"""Go or no-go from figures alone, the projection from a rate, and the distances behind them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from medaug import assets
from medaug.cohort import Cohort
from medaug.errors import ConfigError
from medaug.quality import pilot
from medaug.quality.fidelity import RandomConvFeatures, features_of
from medaug.quality.fidelity_table import FeatureSet
from medaug.quality.images import image_batches
from medaug.quality.pilot import FAIL, PASS, UNDEFINED, PilotLimits
from medaug.quality.pilot_measures import kid_rows, noisy_batches
from medaug.quality.pilot_projection import Rate, project
from medaug.quality.verdicts import ClassAcceptance
from medaug.workflow import read_yaml

SHARES = ("least_acceptance", "most_outliers", "most_copies", "least_accuracy", "most_disk")


def entry(passed: int, generated: int, name: str = "a") -> ClassAcceptance:
    return ClassAcceptance(name, generated, passed, passed, 0, generated - passed, None, None)


@pytest.mark.parametrize("name", assets.list_pilots())
def test_shipped_limits_are_whole(name: str) -> None:
    limits = PilotLimits.of(read_yaml(assets.pilot_path(name)))
    assert 0 < limits.least_acceptance < 1 and limits.most_hours > 0


@pytest.mark.parametrize(
    "change",
    [{name: value} for name in SHARES for value in (-0.1, 1.1, math.nan, True, "half")]
    + [{"most_hours": math.inf}, {"kid_noise": -1}, {"most_hours": None}, {"most_houres": 1}],
)
def test_other_limits_are_refused(change: dict[str, Any]) -> None:
    values = read_yaml(assets.pilot_path("default"))
    with pytest.raises(ConfigError, match="pilot-limits"):
        PilotLimits.of(values | change)


def test_every_limit_is_needed() -> None:
    values = read_yaml(assets.pilot_path("default"))
    for name in values:
        with pytest.raises(ConfigError, match=f"pilot-limits.*{name}"):
            PilotLimits.of({key: value for key, value in values.items() if key != name})


def test_the_interval_is_that_of_clopper_and_pearson() -> None:
    low, high = pilot.share_interval(6, 32)
    assert low == pytest.approx(beta.ppf(0.025, 6, 27)) and high == pytest.approx(beta.ppf(0.975, 7, 26))
    assert pilot.share_interval(0, 5)[0] == 0 and pilot.share_interval(5, 5)[1] == 1


def test_acceptance_is_that_of_the_worst_class_that_was_generated() -> None:
    rows = [entry(30, 32, "good"), entry(6, 32, "bad"), entry(0, 0, "unwanted")]
    found = pilot.acceptance_check(rows, 0.2)
    assert (found.outcome, found.value, found.limit) == (FAIL, 6 / 32, 0.2)
    assert "class bad" in found.sentence and "6 of 32 (19 %, 95 % interval 7 to 36 %)" in found.sentence
    assert pilot.acceptance_check(rows, 6 / 32).outcome == PASS


@pytest.mark.parametrize(("hits", "outcome"), [(5, PASS), (6, FAIL)])
def test_shares_at_their_limit_pass(hits: int, outcome: str) -> None:
    assert pilot.copy_check({"copies": hits, "n": 100}, 0.05).outcome == outcome
    assert pilot.outlier_check({"flagged": hits, "n": 100, "n_validation": 40}, 0.05).outcome == outcome


def test_what_cannot_be_measured_is_undefined_with_its_reason() -> None:
    project_nothing = {"seconds": None, "bytes": None, "reason": "no rate"}
    found = [
        pilot.outlier_check(None, 0.5, "no validation"),
        pilot.kid_check(None, 0.5),
        pilot.kid_check({"value": 1.0, "limit": None, "note": "no held-out"}, 0.5),
        pilot.kid_check({"value": None, "limit": 1.0, "note": "insufficient"}, 0.5),
        pilot.copy_check(None, 0.05),
        pilot.copy_check({"copies": 0, "n": 0}, 0.05),
        pilot.accuracy_check(None, 0.5, "no validation"),
        pilot.time_check(project_nothing, 24),
        pilot.disk_check(project_nothing, 10**9, 0.5),
    ]
    assert {check.outcome for check in found} == {UNDEFINED} and all(check.sentence for check in found)
    assert pilot.go(found) and not pilot.go([*found, pilot.copy_check({"copies": 9, "n": 10}, 0.05)])


@pytest.mark.parametrize(("synthetic", "outcome"), [(0.65, PASS), (0.55, FAIL), (0.3, FAIL)])
def test_accuracy_is_the_gain_beyond_chance_over_that_of_real_images(synthetic: float, outcome: str) -> None:
    facts = {"synthetic": synthetic, "real": 0.9, "chance": 0.25, "n": 96, "n_validation": 80}
    found = pilot.accuracy_check(facts, 0.6)
    assert found.outcome == outcome
    assert found.value == pytest.approx((synthetic - 0.25) / 0.65)


def test_accuracy_is_undefined_where_real_images_teach_nothing() -> None:
    # Half an interval of guessing over two classes on 96 images: 1.96 * 0.5 / sqrt(96) = 0.1.
    facts = {"synthetic": 0.4, "chance": 0.5, "n": 20, "n_validation": 96}
    assert pilot.accuracy_check(facts | {"real": 0.59}, 0.5).outcome == UNDEFINED
    assert pilot.accuracy_check(facts | {"real": 0.61}, 0.5).outcome == FAIL


def test_the_projection_has_its_known_answer() -> None:
    rate = Rate(images=64, seconds=32.0, largest_batch=16, memory_before=1_000, memory_peak=1_400)
    found = project([entry(8, 32, "a"), entry(15, 32, "b"), entry(0, 0, "c")], [100, 50, 0], rate, 2_000.0, batch_size=64)
    assert [row["generate"] for row in found["classes"]] == [400, 107, 0]  # 100 * 32 / 8, and 50 * 32 / 15 = 106.7
    assert (found["generate"], found["wanted"], found["made"]) == (507, 150, 64)
    assert found["seconds"] == 507 * 0.5
    assert found["bytes"] == (507 + 150) * 2_000  # accepted images are stored twice
    assert found["memory_bytes"] == 1_000 + 4 * 400  # batches four times as large
    low, high = beta.ppf(0.025, 8, 25), beta.ppf(0.975, 9, 24)
    assert (found["classes"][0]["low"], found["classes"][0]["high"]) == (math.ceil(100 / high), math.ceil(100 / low))
    assert pilot.time_check(found, 507 * 0.5 / 3600).outcome == PASS and pilot.time_check(found, 0.01).outcome == FAIL
    assert (
        pilot.disk_check(found, 657 * 2_000 * 2, 0.5).outcome == PASS
        and pilot.disk_check(found, 657 * 2_000, 0.5).outcome == FAIL
    )


def test_nothing_accepted_has_no_end_and_no_rate_has_no_time() -> None:
    rate = Rate(32, 16.0, 16, 0, 0)
    never = project([entry(0, 32, "a"), entry(32, 32, "b")], [10, 10], rate, 100.0, 16)
    assert never["generate"] is never["seconds"] is never["seconds_high"] is None and "class a" in never["reason"]
    assert never["seconds_low"] > 0
    still = project([entry(16, 32)], [10], Rate(), 100.0, 16)
    assert (still["generate"], still["seconds"], still["memory_bytes"]) == (20, None, None) and "rate" in still["reason"]


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 64), st.integers(0, 64))
def test_enough_images_are_made_and_never_fewer_than_wanted(wanted: int, generated: int, passed: int) -> None:
    passed = min(passed, generated)
    (row,) = project([entry(passed, generated)], [wanted], Rate(), None, 16)["classes"]
    if passed:
        assert (row["generate"] - 1) * passed < wanted * generated <= row["generate"] * passed
        assert wanted <= row["low"] <= row["generate"] <= row["high"]
    else:
        assert row["generate"] is row["high"] is None


@pytest.fixture(scope="module")
def discs(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return make_cohort(tmp_path_factory.mktemp("discs"), num_classes=2, per_class=150)


def test_noise_belongs_to_its_image_and_has_its_size(discs: Cohort) -> None:
    cases = discs.training[:8]
    alone = torch.cat([batch for case in cases for batch in noisy_batches(discs, [case], 0.2)])
    together = torch.cat(list(noisy_batches(discs, cases, 0.2)))
    torch.testing.assert_close(alone, together)
    clean = torch.cat(list(image_batches(discs, cases)))
    ratio = (together - clean).flatten(1).std(dim=1) / clean.flatten(1).std(dim=1)
    assert ratio.numpy() == pytest.approx(0.2, rel=0.15)
    assert torch.equal(torch.cat(list(noisy_batches(discs, cases, 0.0))), clean)


def test_kid_grows_with_noise_and_small_classes_are_insufficient(discs: Cohort) -> None:
    extractor = RandomConvFeatures(0)

    def of(name: str, batches: Any, cases: Any) -> FeatureSet:
        return FeatureSet(name, features_of(extractor, batches), np.array([case.label for case in cases]))

    training = of("training", image_batches(discs, discs.training), discs.training)
    held = discs.validation
    noisy = {share: of("noisy", noisy_batches(discs, held, share), held) for share in (0.25, 0.5, 1.0)}
    clean = of("held-out", image_batches(discs, held), held)
    rows = {share: kid_rows(training, noisy[1.0], clean, noisy[share], discs.classes) for share in noisy}
    everything = [rows[share][0] for share in (0.25, 0.5, 1.0)]
    assert everything[0]["floor"] < everything[0]["limit"] < everything[1]["limit"] < everything[2]["limit"]
    assert everything[2]["value"] == everything[2]["limit"]
    assert everything[0]["low"] < everything[0]["value"] < everything[0]["high"]
    assert [row["value"] for row in rows[0.5][1:]] == [None, None]  # 30 held-out images of a class
    assert all(row["note"].startswith("insufficient") for row in rows[0.5][1:])
    alone = kid_rows(training, clean, None, None, discs.classes)[0]
    assert alone["value"] is not None and alone["limit"] is None and "held-out" in alone["note"]
    assert pilot.kid_check(rows[0.5][0], 0.5).outcome == FAIL
    assert pilot.kid_check(kid_rows(training, clean, clean, noisy[0.5], discs.classes)[0], 0.5).outcome == PASS


def test_limits_of_a_file_lie_over_the_default_ones(tmp_path: Path) -> None:
    from medaug.pilot import read_limits

    file = tmp_path / "mine.yaml"
    file.write_text("most_hours: 2\n", encoding="utf-8")
    assert read_limits(str(file)).most_hours == 2
    assert read_limits(str(file)).least_acceptance == read_limits("default").least_acceptance
    with pytest.raises(ConfigError, match="pilot-unknown"):
        read_limits("nothing")

"""The gate: synthetic cohort in, accepted cohort out; every image gets a verdict with its reasons, nothing is lost.

Running it again with another threshold or quota needs no generation and reuses the trained filter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medaug import storage
from medaug.cohort import Cohort, check_against, created_by, read_cohort
from medaug.errors import ConfigError, DataError
from medaug.quality.checks import ACCEPT, CHECKS, LABEL_SOURCES, Finding, GateContext
from medaug.quality.feature_cache import FeatureCache
from medaug.quality.gate_config import CheckSpec, PlannedCheck, plan_checks, without_folders
from medaug.quality.gate_output import log_gate, summary_of, write_accepted, write_unlabelled, write_verdicts
from medaug.quality.membership import membership_of_run
from medaug.quality.pseudo_label import PAPER_THRESHOLD, default_recipe
from medaug.quality.review import apply_review, read_reviews, review_facts
from medaug.quality.review_page import write_review
from medaug.quality.verdicts import ClassAcceptance, Verdict, acceptance_per_class, combine, cut_to_quota
from medaug.training.amst_recipe import AmstRecipe
from medaug.training.classifier import ClassifierRecipe

if TYPE_CHECKING:
    from medaug.tracking import Run

FEATURES = "features"  # folder of the cache, within the output
DEFAULT_CHECKS = ("usable", "pseudo_label", "copies")
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

__all__ = ["DEFAULT_CHECKS", "ClassAcceptance", "GateResult", "Verdict", "run_gate"]


@dataclass(frozen=True)
class GateResult:
    """What the gate gives back.

    Attributes:
        accepted: the accepted cohort, as written.
        verdicts: rows ``{"id", "name", "verdict", "reasons", ...}``, in the order of the synthetic cohort.
        acceptance: per class.
        summary: the content of ``gate.json``, verdicts included.
        short: names of classes that missed their quota (only with `allow_short`).
    """

    accepted: Cohort
    verdicts: list[dict[str, Any]]
    acceptance: list[ClassAcceptance]
    summary: dict[str, Any]
    short: list[str]


def run_gate(
    synthetic_dir: Path,
    cohort_dir: Path,
    out: Path,
    *,
    checks: Sequence[CheckSpec] = DEFAULT_CHECKS,
    threshold: float = PAPER_THRESHOLD,
    quotas: Mapping[str, int] | Sequence[int] | None = None,
    recipe: ClassifierRecipe | None = None,
    network: str = "simple_cnn",
    seed: int = 0,
    calibrate: bool = False,
    label: str = "filter",
    amst: AmstRecipe | None = None,
    weights: Path | None = None,
    replace_head: bool = False,
    weights_trusted: bool = False,
    filter_dir: Path | None = None,
    allow_short: bool = False,
    run_dir: Path | None = None,
    review: Sequence[Path] = (),
    tracking: Run | None = None,
    progress: Progress | None = None,
) -> GateResult:
    """Judge every synthetic case, write the accepted ones as a cohort and the report.

    Args:
        synthetic_dir: a cohort folder whose training cases are synthetic.
        cohort_dir: the real cohort that they belong to.
        out: accepted cohort, ``gate.json``, ``report.html``, ``review.html``, ``quarantine.csv``, ``quarantine/``, ``copies/``, ``filter/``, ``features/``.
        checks: names of `CHECKS`, or mappings of a name to its settings, see `plan_checks`; "usable" always runs.
        threshold: confidence that the pseudo-label needs; the paper's 0.8.
        quotas: wanted images per class: by name, or one number per class in order. More are cut in the cohort's order.
        recipe, network, seed, calibrate: of the label filter, see `train_filter`.
        label: "filter": the CNN must confirm the intended label. "amst": accepted is what the heads of AMST agree on, and that is
            the label it carries; images without a trusted label, but nothing else against them, go to ``out/unlabelled``.
        amst: thresholds and training of the heads; `threshold` then means nothing, and `calibrate` is refused.
        weights, replace_head: safetensors checkpoint that AMST's backbone starts from, see `load_backbone`.
        weights_trusted: the user's word for a checkpoint that does not say what it was fitted on, see `check_origin`.
        filter_dir: cache of trained filters; None takes ``out/filter``.
        allow_short: accept a missed quota.
        run_dir: training run of the generator; adds whether its loss tells training images from validation, see `membership`.
        review: CSV files that ``review.html`` exported: a reader's accept or reject wins over the checks, except that nobody
            can accept an unusable image or a near-copy. Quotas are counted afterwards.
        tracking: a run that takes the tables and sheets.
        progress: called as ``progress(description, total)``, like `medaug.progress.progress`.

    Raises:
        LeakageError: generator, filter or `weights` saw a validation or test group, or nothing shows what they saw.
        DataError: `quota-missed` or `nothing-accepted`, after the report is written; no synthetic cases; cohorts that differ;
            a review that cannot be applied, see `read_reviews` and `apply_review`.
        ConfigError: unknown check or class, threshold outside [0, 1].
    """
    out = Path(out)
    planned = plan_checks(checks)
    names = [check.name for check in planned]
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ConfigError("threshold-invalid", f"The confidence threshold must be in [0, 1], got {threshold!r}.")
    real, synthetic = read_cohort(cohort_dir, verify=True), read_cohort(synthetic_dir)
    wanted = _quotas(quotas, real.classes)
    _check_inputs(real, synthetic, out)
    decisions = read_reviews(review, {case.id for case in synthetic.training})
    context = GateContext(
        real, synthetic, Path(filter_dir or out / "filter"), threshold, recipe, network, seed, calibrate,
        label=_check_label(label, weights, calibrate), amst=amst, weights=weights, replace_head=replace_head,
        weights_trusted=weights_trusted, cache=FeatureCache(out / FEATURES),
    )  # fmt: skip
    with storage.locked(out):
        judged = _judge(context, planned, progress)
        verdicts = cut_to_quota(apply_review(judged, decisions), wanted)
        if decisions:
            context.reports["review"] = review_facts(judged, decisions)
        if run_dir is not None:
            context.reports["membership"] = membership_of_run(Path(run_dir), real)
        acceptance = acceptance_per_class(verdicts, real.classes, wanted)
        filter_config = {"network": network, "seed": seed, "calibrate": calibrate, "recipe": asdict(recipe or default_recipe())}
        if label != "filter":
            filter_config |= {"label": label, "amst": (amst or AmstRecipe()).content()}
        config = {"checks": names, "threshold": threshold, "quotas": wanted, **filter_config}
        settings = {check.name: without_folders(check.settings) for check in planned if check.settings}
        config |= {"settings": settings} if settings else {}
        config |= {"review": context.reports["review"]["csv_sha256"]} if decisions else {}
        summary = summary_of(context, names, verdicts, acceptance, config)
        write_verdicts(out, context, verdicts, summary)
        write_review(out, real, synthetic, [verdict.to_json(real.classes) for verdict in judged], decisions)
        log_gate(tracking, context, verdicts, summary)
        made = created_by("medaug gate", config, seed)
        write_unlabelled(out, context, names, verdicts, made)
        short = [entry.name for entry in acceptance if entry.short]
        _refuse_short(acceptance, allow_short)
        accepted = write_accepted(out, context, names, verdicts, made)
        if tracking is not None:
            tracking.log_cohort(accepted, "accepted")
    return GateResult(accepted, summary["verdicts"], acceptance, summary, short)


def _check_label(label: str, weights: Path | None, calibrate: bool) -> str:
    if label not in LABEL_SOURCES:
        raise ConfigError("label-source-unknown", f"Labels must come from one of {', '.join(LABEL_SOURCES)}, got {label!r}.")
    if weights is not None and label != "amst":
        raise ConfigError("weights-unused", "A checkpoint to start from belongs to labels from amst; the filter is trained anew.")
    if calibrate and label != "filter":
        raise ConfigError(
            "calibrate-unused", "A temperature belongs to the label filter; labels from amst have their own threshold."
        )
    return label


def _quotas(quotas: Mapping[str, int] | Sequence[int] | None, classes: Sequence[str]) -> list[int | None]:
    """One quota per class; a class that a mapping does not name has none."""
    if quotas is None:
        return [None] * len(classes)
    if isinstance(quotas, Mapping):
        unknown = set(quotas) - set(classes)
        if unknown:
            raise ConfigError("quota-class-unknown", f"Quotas name {sorted(unknown)}, the cohort has {list(classes)}.")
        found: list[int | None] = [quotas.get(name) for name in classes]
    else:
        found = list(quotas)
    if len(found) != len(classes) or any(quota is not None and quota < 0 for quota in found):
        raise ConfigError("quota-invalid", f"Quotas need one number of 0 or more per class ({len(classes)}), got {list(found)}.")
    return found


def _check_inputs(real: Cohort, synthetic: Cohort, out: Path) -> None:
    if not synthetic.training:
        raise DataError("synthetic-empty", "The synthetic cohort has no training cases; generate some first.")
    made = sum(case.is_synthetic for case in synthetic.training)
    if made < len(synthetic.training):
        real_cases = len(synthetic.training) - made
        raise DataError(
            "not-synthetic", f"{real_cases} case(s) of the synthetic cohort carry no lineage; the gate judges generated images."
        )
    if synthetic.validation or synthetic.test:
        raise DataError("not-synthetic", "A synthetic cohort has training cases only; this one has a validation or test split.")
    # Images that were imported as untrusted are judged and stay marked; `medaug grade` asks for a word of the user.
    untrusted = all((case.lineage or {}).get("untrusted") for case in synthetic.training)
    check_against(synthetic, real, allow_untrusted=untrusted)
    if out.resolve() in {root.resolve() for root in (real.root, synthetic.root) if root}:
        raise ConfigError("out-is-input", "--out must be another folder than the cohort and the synthetic cohort.")


def _judge(context: GateContext, planned: Sequence[PlannedCheck], progress: Progress | None) -> list[Verdict]:
    """Run the checks in order; after "usable" they see the readable images only."""
    cases = list(context.synthetic.training)
    findings: dict[str, list[Finding]] = {case.id: [] for case in cases}
    names = [check.name for check in planned]
    with progress("gate", len(names)) if progress else nullcontext(lambda steps: None) as advance:
        for check in planned:
            for case, finding in zip(cases, CHECKS[check.name](context, cases, **check.settings), strict=True):
                findings[case.id].append(finding)
            if check.name == "usable":
                cases = [case for case in cases if findings[case.id][0].verdict == ACCEPT]
            advance(1)
    return [combine(case, findings[case.id], names) for case in context.synthetic.training]


def _refuse_short(acceptance: Sequence[ClassAcceptance], allow_short: bool) -> None:
    if allow_short:
        return
    advice = "train the generator longer or lower --threshold; report.html shows what was turned away and why."
    short = [
        f"{entry.name} wanted {entry.quota}, got {entry.accepted} (acceptance {entry.rate or 0:.0%} of {entry.generated})"
        for entry in acceptance
        if entry.short
    ]
    if short:
        text = f"Too few images passed the gate: {'; '.join(short)}. Generate more of them, allow a short quota, {advice}"
        raise DataError("quota-missed", text)
    if not any(entry.accepted for entry in acceptance):
        raise DataError("nothing-accepted", f"No image passed the gate; {advice}")

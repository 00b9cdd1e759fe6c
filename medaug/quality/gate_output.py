"""What the gate writes: verdicts, quarantine, report, the accepted cohort, and its MLflow records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medaug import cohort as cohorts
from medaug import storage
from medaug.cohort import Case, Cohort, fit_sha256, write_cohort
from medaug.errors import LeakageError
from medaug.quality.amst_labels import facts_for_report
from medaug.quality.checks import ACCEPT, QUARANTINE, GateContext
from medaug.quality.copy_pictures import write_copy_pictures
from medaug.quality.copy_ruler import real_cases
from medaug.quality.fidelity import Estimate, kid
from medaug.quality.report import class_sheets, write_report
from medaug.quality.verdicts import ClassAcceptance, Verdict, agreement
from medaug.replay_record import carry_record

if TYPE_CHECKING:
    from medaug.tracking import Run

FORMAT = 1
GATE_NAME = "gate.json"
UNLABELLED = "unlabelled"
FITTED = {"judge", "outliers", "real_fake"}  # checks that are fitted on the real training images, as the filter is
_FILTER_FACTS = (
    "network", "best_step", "fit_on", "fit_cases", "temperature", "weights_sha256", "validation", "test", "calibration", "recipe",
    "seed",
)  # fmt: skip

__all__ = ["log_gate", "summary_of", "write_accepted", "write_unlabelled", "write_verdicts"]


def _fidelity(context: GateContext, accepted: Sequence[Case]) -> list[dict[str, Any]]:
    """KID of the accepted images to real training and validation, beside training to validation as the floor."""
    ruler = context.ruler
    real = {"training": ruler.training}
    if context.cohort.validation:
        real["validation"] = ruler.features(context.cohort, context.cohort.validation)
    rows: list[tuple[str, Estimate]] = []
    if accepted:
        features = ruler.features(context.synthetic, accepted)
        rows += [(f"accepted to {name}", kid(values, features)) for name, values in real.items()]
    if "validation" in real:
        rows.append(("training to validation (floor)", kid(real["validation"], real["training"])))
    return [{"pair": pair, "extractor": ruler.extractor.name, **asdict(estimate)} for pair, estimate in rows]


def summary_of(
    context: GateContext,
    names: Sequence[str],
    verdicts: Sequence[Verdict],
    acceptance: Sequence[ClassAcceptance],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of ``gate.json``."""
    classes = context.cohort.classes
    summary: dict[str, Any] = {
        "format": FORMAT,
        "cohort_sha256": context.cohort.content_sha256,
        "synthetic_sha256": context.synthetic.content_sha256,
        "config": dict(config),
        "acceptance": [asdict(entry) | {"short": entry.short} for entry in acceptance],
        "reasons": dict(Counter(code for verdict in verdicts for code, _ in verdict.reasons).most_common()),
    }
    untrusted = sum(bool((verdict.case.lineage or {}).get("untrusted")) for verdict in verdicts)
    if untrusted:
        summary["untrusted"] = untrusted
    if "pseudo_label" in names:
        facts = context.label_filter.facts
        summary["filter"] = {key: facts[key] for key in _FILTER_FACTS if key in facts} | facts_for_report(facts)
        summary["agreement"] = agreement(verdicts, len(classes))
    if "copies" in names and context.copies is not None:
        ruler = context.ruler
        facts = {"threshold": ruler.threshold, "basis": ruler.basis, "basis_n": ruler.n, "extractor": ruler.extractor.name}
        summary["copies"] = asdict(context.copies) | facts
        summary["fidelity"] = _fidelity(context, [verdict.case for verdict in verdicts if verdict.verdict == ACCEPT])
    return summary | context.reports | {"verdicts": [verdict.to_json(classes) for verdict in verdicts]}


def write_verdicts(out: Path, context: GateContext, verdicts: Sequence[Verdict], summary: Mapping[str, Any]) -> None:
    """``gate.json``, ``quarantine.csv``, ``quarantine/`` and ``report.html``; the cohort of an earlier gate goes first."""
    with storage.storage_errors(cohorts.FILE_NAME):
        (out / cohorts.FILE_NAME).unlink(missing_ok=True)
    held = [verdict.case for verdict in verdicts if verdict.verdict == QUARANTINE]
    _place(context.synthetic, held, out, "quarantine")
    write_copy_pictures(out, context.cohort, context.synthetic, [verdict for verdict in verdicts if verdict.verdict != ACCEPT])
    rows = [
        {"file": _file_of(verdict), "code": code, "reason": text}
        for verdict in verdicts
        if verdict.verdict != ACCEPT
        for code, text in verdict.reasons
    ]
    storage.write_csv(out / "quarantine.csv", rows, cohorts.QUARANTINE_COLUMNS)
    storage.write_json(out / GATE_NAME, summary)
    write_report(out / "report.html", context.cohort, context.synthetic, summary)
    storage.write_json(out / "report.json", {key: value for key, value in summary.items() if key != "verdicts"})


def _file_of(verdict: Verdict) -> str:
    held = verdict.verdict == QUARANTINE
    return f"quarantine/{verdict.case.id}.png" if held else verdict.case.name or verdict.case.id


def _place(source: Cohort, cases: Sequence[Case], out: Path, folder: str) -> None:
    """Make ``out/folder`` hold the images of exactly these cases."""
    kept = set()
    for case in cases:
        target = out / folder / f"{case.id}.png"
        kept.add(target.name)
        data = source.path(case).read_bytes()
        if not target.is_file() or target.read_bytes() != data:
            storage.write_bytes(target, data)
    with storage.storage_errors(folder):
        for path in (out / folder).glob("*.png"):
            if path.name not in kept:
                path.unlink()  # of an earlier gate with other settings


def write_accepted(
    out: Path, context: GateContext, names: Sequence[str], verdicts: Sequence[Verdict], made: Mapping[str, Any]
) -> Cohort:
    """The accepted cohort: images, extended lineage, and `fit_on` as the union of generator and filter groups."""
    accepted = [verdict for verdict in verdicts if verdict.verdict == ACCEPT]
    return _write_cases(out, context, names, accepted, made, "accepted")


def write_unlabelled(
    out: Path, context: GateContext, names: Sequence[str], verdicts: Sequence[Verdict], made: Mapping[str, Any]
) -> Cohort | None:
    """``out/unlabelled``: a cohort of the images that lack a trusted label and nothing else, for training by consistency.

    Their labels are those they were generated for and mean nothing. None, and no cohort there, if there is no such image.
    """
    kept = [verdict for verdict in verdicts if verdict.unlabelled]
    folder = out / UNLABELLED
    if not kept:
        _place(context.synthetic, [], folder, "images")
        with storage.storage_errors(cohorts.FILE_NAME):
            (folder / cohorts.FILE_NAME).unlink(missing_ok=True)
        return None
    return _write_cases(folder, context, names, kept, made, UNLABELLED)


def _write_cases(
    out: Path, context: GateContext, names: Sequence[str], verdicts: Sequence[Verdict], made: Mapping[str, Any], what: str
) -> Cohort:
    filter_groups = set(context.label_filter.fit_groups) if "pseudo_label" in names else set()
    if FITTED & set(names):
        filter_groups |= {case.group for case in real_cases(context.cohort)}
    unions: dict[str, list[str]] = {}
    cases = []
    for verdict in verdicts:
        lineage = dict(verdict.case.lineage or {})
        lineage |= verdict.lineage
        if not lineage.get("untrusted"):  # what the filter saw says nothing of an unknown generator
            groups = sorted(set(context.synthetic.fit_on[lineage["fit_on"]]) | filter_groups)
            sha = fit_sha256(groups)
            unions[sha] = groups
            lineage |= {"generator_fit_on": lineage["fit_on"], "fit_on": sha}
        lineage |= {"verdict": verdict.verdict, "reasons": [code for code, _ in verdict.reasons]}
        if verdict.relabelled is not None:
            lineage.setdefault("intended_label", verdict.case.label)
        if "pseudo_label" in names:
            lineage["filter_sha256"] = context.label_filter.facts["weights_sha256"]
        if "judge" in names:
            lineage["judge_sha256"] = context.reports["judge"]["weights_sha256"]
        image = f"images/{verdict.case.id}.png"
        cases.append(replace(verdict.case, image=image, label=verdict.label, lineage=lineage))
    outside = set().union(*unions.values()) - context.cohort.groups("training") if unions else set()
    if outside:
        raise LeakageError("fit-on-held-out", f"The generator or filter saw {len(outside)} group(s) outside the training split.")
    _place(context.synthetic, [verdict.case for verdict in verdicts], out, "images")
    carry_record([context.synthetic.root], out)
    notes = {**context.synthetic.notes, "generated_by": dict(context.synthetic.created_by)}
    name = f"{context.synthetic.name} {what}"
    cohort = replace(context.synthetic, name=name, training=tuple(cases), fit_on=unions, created_by=made, notes=notes, root=out)
    return write_cohort(cohort, out)


def log_gate(run: Run | None, context: GateContext, verdicts: Sequence[Verdict], summary: Mapping[str, Any]) -> None:
    """The gate's tables, rates and sheets; class names are labels, so no patient is named."""
    if run is None:
        return
    run.log_params(summary["config"])
    run.log_cohort(context.cohort, "reference")
    run.log_cohort(context.synthetic, "synthetic")
    metrics = {f"acceptance.{row['name']}": row["rate"] for row in summary["acceptance"]}
    metrics["accepted"] = sum(row["accepted"] for row in summary["acceptance"])
    metrics["copy_rate"] = (summary.get("copies") or {}).get("rate")
    metrics["filter_accuracy"] = ((summary.get("filter") or {}).get("validation") or {}).get("accuracy")
    run.log_metrics(metrics)
    run.log_table(summary["acceptance"], "gate_acceptance")
    run.log_table([{**row, "reasons": " ".join(row["reasons"])} for row in summary["verdicts"]], "gate_verdicts")
    for step, sheet in enumerate(class_sheets(context.cohort, context.synthetic, summary["verdicts"])):
        run.log_image(sheet, "gate/real accepted quarantined rejected", step)

"""The README of a page: every sentence and figure in it follows from the study; nothing is written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medaug.cohort import SPLITS
from medaug.evidence.shown import counted, figure, listed, markdown
from medaug.grading.record import CellName, GradingRecord
from medaug.grading.rows import Row
from medaug.grading.tables import ALL, class_rows, interval, number, table_rows
from medaug.grading.verdict import BASELINE, METRIC_LABELS, primary_metric
from medaug.results.limits import Outcome, limits
from medaug.results.study import Study

VERDICTS = {"helps": "Helps", "harms": "Harms", "no evidence": "No evidence"}
_UNITS = ((7200, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))
_EMPHASIS = re.compile(r"[*~$]|(?<![^\W_])_|_(?![^\W_])")  # a line between two letters is one, and no emphasis

__all__ = ["Ready", "escaped", "readme"]


class Ready(str):
    """Markdown that is to be taken as it is."""


def escaped(value: Any) -> str:
    """A value as Markdown shows it literally; a `Ready` text as it is."""
    if isinstance(value, Ready):
        return value
    return _EMPHASIS.sub(lambda sign: f"\\{sign[0]}", markdown(str(value)))


def readme(study: Study, outcome: Outcome, figures: Sequence[str], notes: str) -> str:
    """The page's README.

    Args:
        outcome: the judged part of the study.
        figures: names of the pictures beside it.
        notes: a person's, appended word for word; empty for none.
    """
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        loader=jinja2.PackageLoader("medaug.results"),
        finalize=escaped,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    record, facts = study.record, study.facts
    return environment.get_template("README.md.j2").render(
        title=_title(study),
        unfinished=_unfinished(study, outcome),
        asked=_asked(study, outcome),
        summary=_summary(outcome),
        arms=[_arm(entry) for entry in outcome.verdict.values()],
        ungraded=[line for line in facts.get("made") or () if line["accepted"] == 0 or line.get("seeds_without")],
        warnings=_warnings(outcome),
        figures=figures,
        samples="samples.png" if facts.get("samples") else None,
        command=Ready(_one_line(facts.get("command") or "")),
        where=_where(study),
        data=_data(record),
        intake=_intake(facts.get("intake")),
        counts=_counts(record),
        leak=_leak(record),
        acceptance=_acceptance(record),
        image_sets=listed(record.image_sets),
        made=[line for line in facts.get("made") or () if line["generated"]],
        pilots=_pilots(facts.get("calibrations") or ()),
        relabelled=_relabelled(outcome.rows),
        networks=_by_network(outcome),
        recipe=_recipe(outcome),
        classes=_by_class(outcome),
        limits=limits(outcome),
        notes=Ready(notes.strip()),
        ready=Ready,
    )


def _one_line(text: str) -> str:
    """Text on one line, for a block of code."""
    return " ".join(text.split())


def _title(study: Study) -> str:
    if study.facts.get("title"):
        return str(study.facts["title"])
    name = study.facts.get("name")
    return f"{name or 'Comparison of ways to train'}: {study.record.data.name}"


def _unfinished(study: Study, outcome: Outcome) -> str:
    record = study.record
    missing = record.missing(study.rows)
    if record.finished and not missing:
        return ""
    judged = outcome.record
    arms = [arm.name for arm in record.arms if arm not in judged.arms]
    networks = [name for name in _networks(record.cells) if name not in _networks(judged.cells)] if not arms else []
    text = f"{len(missing)} of {counted(len(record.cells), 'training run')} are missing"
    without = f"; the arms {listed(arms)} are left out" if arms else ""
    without = f"; the networks {listed(networks)} are left out" if networks else without
    return f"{text}{without}. What follows may change with the rest and is no result."


def _networks(cells: Sequence[CellName]) -> list[str]:
    """Each network of the cells once, in their order."""
    return list(dict.fromkeys(cell.network for cell in cells))


def _asked(study: Study, outcome: Outcome) -> str:
    data, facts = study.record.data, study.facts
    networks = list(dict.fromkeys(row["network"] for row in outcome.rows))
    arms = list(dict.fromkeys(row["arm"] for row in outcome.rows))
    question = facts.get("asked") or "Does training in these ways help classifiers that are tested on real images alone?"
    text = f"{question} Arms: {listed(arms)}; classes: {listed(data.classes)}; networks: {listed(networks)}; "
    text += f"{counted(len({row['seed'] for row in outcome.rows}), 'seed')}."
    return text + (f" The arm {BASELINE} is the cell orig100." if facts.get("cells") else "")


def _summary(outcome: Outcome) -> str:
    if not outcome.verdict:
        return f"Only the arm {BASELINE} was trained, so there is nothing to compare."
    groups = {verdict: [arm for arm, entry in outcome.verdict.items() if entry["verdict"] == verdict] for verdict in VERDICTS}
    if len(groups["no evidence"]) == len(outcome.verdict):
        return f"No evidence of help or harm in {'the arm' if len(outcome.verdict) == 1 else 'any of the arms'} {listed(groups['no evidence'])}."
    return " ".join(f"{VERDICTS[verdict]}: {listed(arms)}." for verdict, arms in groups.items() if arms)


def _arm(entry: Mapping[str, Any]) -> dict[str, str]:
    """An arm's verdict: the sentence of `judge`, then what it rests on."""
    parts = [_tested("none", entry["against_none"], entry["wilcoxon"], entry["opponents"]["baseline"])]
    if entry["against_control"]:
        parts.append(
            _tested("repeated real images", entry["against_control"], entry["wilcoxon_control"], entry["opponents"]["control"])
        )
    if entry["against_views"]:
        parts.append(f"against real images in the same views: Holm-adjusted p {figure(entry['against_views']['p_holm'])}")
    if entry["validation_difference"] is not None:
        parts.append(f"difference to none on validation {figure(entry['validation_difference'], signed=True)}")
    parts += _ranked(entry["ranking"] or {})
    details = f"{'; '.join(parts)}."
    return {"verdict": VERDICTS[entry["verdict"]], "sentence": entry["sentence"], "details": details[0].upper() + details[1:]}


def _ranked(ranking: Mapping[str, Any]) -> list[str]:
    """The area under the ROC curve against plain training and, where there is one, the control."""
    none, control = ranking.get("against_none"), ranking.get("against_control")
    if not none or none["difference"] is None:
        return ["area under the ROC curve undefined"] if none else []

    def interval(result: Mapping[str, Any]) -> str:
        low, high = (figure(result[name], signed=True) for name in ("low", "high"))
        return f"{figure(result['difference'], signed=True)} ({low} to {high})"

    text = f"area under the ROC curve {figure(none['score_a'])} against {figure(none['score_b'])}, {interval(none)}"
    return [text + (f"; against repeated real images {interval(control)}" if control else "")]


def _tested(words: str, result: Mapping[str, Any], ranks: Mapping[str, Any], name: str) -> str:
    other = words if name in words else f"{words} ({name})"
    signs = "" if ranks["p_value"] is None else f", signed-rank p {figure(ranks['p_value'])}, adjusted {figure(ranks['p_holm'])}"
    return (
        f"against {other}: p {figure(result['p_value'])}, Holm-adjusted {figure(result['p_holm'])}, better in {ranks['wins']} of "
        f"{counted(ranks['num_networks'], 'network')}{signs}"
    )


def _warnings(outcome: Outcome) -> list[str]:
    """Those of the verdict but the leak indicator's, which stands with the data."""
    found = dict.fromkeys(text for entry in outcome.verdict.values() for text in entry["warnings"])
    return [text for text in found if text != outcome.record.data.leak.get("warning")]


def _where(study: Study) -> str:
    """Commit, machine and time of the sessions."""
    environments, stages = study.times["environments"], study.times["stages"]
    if not environments:
        return "The environment and the time it took were not recorded."
    places = []
    for entry in environments:
        commit = f"commit {str(entry['commit'])[:12]}{' with local changes' if ' ' in str(entry['commit']) else ''}"
        version = f"medaug {entry['packages'].get('medaug', 'of unknown version')}"
        places.append(f"{version}{f', {commit}' if entry['commit'] else ''}, Python {entry['python']}, {entry['machine']}")
    seconds: dict[str, float] = {}
    for entry in stages:
        seconds[entry["stage"]] = seconds.get(entry["stage"], 0.0) + entry["seconds"]
    spent = ", ".join(f"{stage} {_duration(total)}" for stage, total in seconds.items())
    return f"Run with {'; '.join(places)}. Time: {spent}.{_profiles(study)}"


def _profiles(study: Study) -> str:
    own, graders = study.facts.get("profile"), study.record.profile
    makers = f"{own} of the generators, " if own else ""
    return f" Profiles: {makers}{graders} of the graders." if graders else ""


def _duration(seconds: float) -> str:
    size, name = next((size, name) for least, size, name in _UNITS if seconds >= least)
    return f"{seconds / size:.3g} {name}"


def _data(record: GradingRecord) -> str:
    data, made = record.data, record.data.created_by
    kind = f"{data.modality} images" if data.modality else "images"
    text = f"Cohort {data.name}: {kind} of {data.image_size} x {data.image_size} px, "
    text += f"{'ordered' if data.ordinal else 'unordered'} classes, content sha256 {data.content_sha256[:12]}"
    by = f"; made with medaug {made['version']}, settings sha256 {str(made['config_sha256'])[:12]}, seed {made['seed']}"
    return text + (by if {"version", "config_sha256", "seed"} <= set(made) else "") + "."


def _intake(section: Mapping[str, Any] | None) -> str:
    """The section of an experiment's file that made the cohort, with its variables."""
    return listed(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in (section or {}).items())


def _counts(record: GradingRecord) -> list[list[Any]]:
    """Images per class and split, then all and their groups."""
    splits = [record.data.splits[split] for split in SPLITS]
    lines = [[name, *(split["per_class"][label] for split in splits)] for label, name in enumerate(record.data.classes)]
    return [*lines, ["all", *(split["images"] for split in splits)], ["groups", *(split["groups"] for split in splits)]]


def _leak(record: GradingRecord) -> str:
    leak = record.data.leak
    if not leak.get("n"):
        return "The leak indicator was not measured, so nothing speaks for or against patients who cross the splits."
    found = leak.get("verdict") or (
        f"the nearest training image has the label of a test image with balanced accuracy {figure(leak.get('balanced_accuracy'))} "
        f"(chance {figure(leak.get('chance'))})."
    )
    warning = leak.get("warning")
    return f"Leak indicator: {found}" + (f" {warning}" if warning and warning not in found else "")


def _acceptance(record: GradingRecord) -> list[list[Any]]:
    """Per arm, source and class: generated, accepted, share. Arms of the same images share their lines."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for arm, sources in (record.acceptance or {}).items():
        for classes in sources.values():
            for row in classes:
                found.setdefault((row["name"], row["generated"], row["accepted"], str(classes)), []).append(arm)
    return [
        [listed(dict.fromkeys(arms)), name, generated, accepted, f"{accepted / generated:.0%}" if generated else "–"]
        for (name, generated, accepted, _), arms in found.items()
    ]


def _pilots(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[list[Any]]]:
    """The rule of a calibration -> a line for each row of the experiment and each scale that was tried, the chosen one in bold."""
    found: dict[str, list[list[Any]]] = {}
    for line in lines:
        name = line["row"] + (f", seed {line['seed']}" if "seed" in line else "")
        for row in line["rows"]:
            scale = f"{row['scale']:g}"
            chosen = Ready(f"**{scale}**") if row["scale"] == line["scale"] else scale
            figures = [f"{row[key]:.3f}" for key in ("agreement", "distance", "copy_rate")]
            found.setdefault(_rule(line), []).append([name, chosen, *figures])
    return found


def _rule(line: Mapping[str, Any]) -> str:
    """What a calibration chooses by, and how far its judge is to be trusted."""
    judge = line["judge"]
    right = f"balanced accuracy {figure(judge['balanced_accuracy'])} on {counted(judge['n'], 'validation image')}"
    return (
        f"In bold the largest scale that leaves {line['least_agreement']:.0%} of the labels that a judge sees without noise, and moves an image "
        f"further than a weak copy does ({line['weak_distance']:.3f}), on {counted(line['seed_images'], 'training image')}. The judge has learned from them"
        f"{f' ({right})' if judge['n'] else ''}."
    )


def _relabelled(rows: Sequence[Row]) -> list[list[str]]:
    """What AMST made of the seed images' labels, a line for each arm and network with the range over seeds; nothing where it kept all."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("amst"):
            found.setdefault((row["arm"], row["network"]), []).append(row["amst"])
    lines = []
    for (arm, network), reports in found.items():
        kept = [(report["accepted"], report["scored"]) for report in reports]
        other = [(report["relabelled"], report["accepted"]) for report in reports]
        seen = [(report["scored"] - int(np.trace(report["confusion_all"])), report["scored"]) for report in reports]
        if any(part for part, _ in seen) or any(part < whole for part, whole in kept):
            lines.append([arm, network, *map(_shares, (kept, other, seen))])
    return lines


def _shares(parts: Sequence[tuple[int, int]]) -> str:
    """The least and the largest of several shares, in percent; a share of nothing is none."""
    known = [part / whole for part, whole in parts if whole]
    if not known:
        return "–"
    low, high = (f"{pick(known):.0%}" for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _by_class(outcome: Outcome) -> list[list[Any]]:
    """Recall of every arm and class with its differences to none and to the control."""
    data = outcome.record.data
    return [
        [line["arm"], line["class"], line["images"], figure(line["recall"]), figure(line["recall_none"])]
        + [interval(line), interval(line, "control_difference")]
        for line in class_rows(outcome.verdict, data.classes, data.splits["test"]["per_class"])
    ]


def _recipe(outcome: Outcome) -> str:
    """How the networks were trained, the same in every arm; where they differ, the values with their networks."""
    found: dict[str, dict[Any, list[str]]] = {}
    for row in outcome.rows:
        recipe = row["key"]["recipe"]
        for name in ("num_steps", "batch_size", "learning_rate", "precision"):
            networks = found.setdefault(name, {}).setdefault(recipe.get(name, "float32"), [])
            networks += [row["network"]] if row["network"] not in networks else []
    words = {
        "num_steps": "{} optimiser steps",
        "batch_size": "{} images in a batch",
        "learning_rate": "learning rate {}",
        "precision": "{}",
    }
    parts = []
    for name, values in found.items():
        usual = max(values, key=lambda value: len(values[value]))
        others = [f"{value} for {listed(networks)}" for value, networks in values.items() if value != usual]
        parts.append(words[name].format(usual) + (f" ({'; '.join(others)})" if others else ""))
    return f"Trained with, in every arm alike: {'; '.join(parts)}."


def _by_network(outcome: Outcome) -> dict[str, Any]:
    """Primary metric of every arm and network, with the difference to none."""
    metric = primary_metric(outcome.record.data.ordinal)
    lines: dict[str, list[str]] = {}
    table = table_rows(outcome.rows, outcome.verdict)
    for line in table:
        name = "all networks" if line["network"] == ALL else line["network"]
        text = number(line[metric], line[f"{metric}_std"])
        lines.setdefault(name, []).append(text if line["difference"] is None else f"{text} ({line['difference']:+.3f})")
    return {"metric": METRIC_LABELS[metric], "arms": list(dict.fromkeys(line["arm"] for line in table)), "lines": lines}

"""What the records say of the described images, their generator and their gate; None where no record says it."""

from __future__ import annotations

from typing import Any

from medaug.cohort import SPLITS
from medaug.evidence.records import Records
from medaug.evidence.shown import counted, figure, listed, settings

NOT_CLINICAL = "For research only, not for clinical use."


def statement(records: Records) -> str:
    """What kind of images these are; the sentence that must travel with them."""
    made, total = len(records.synthetic), len(records.described.cases())
    if not made:
        return f"None of the {counted(total, 'image')} is recorded as synthetic. {NOT_CLINICAL}"
    return (
        f"{made} of {counted(total, 'image')} {'is' if made == 1 else 'are'} synthetic: made by a generative model, not acquired from a "
        f"person. They show no patient and support no diagnosis. {NOT_CLINICAL}"
    )


def described_set(records: Records) -> str:
    """Name, size and hash of the described cohort."""
    data = records.described
    parts = listed(f"{split} {len(data.split(split))}" for split in SPLITS if data.split(split))
    return f"{data.name!r}: {counted(len(data.cases()), 'image')} ({parts}); content sha256 {data.content_sha256}."


def generator_name(records: Records) -> str | None:
    """The bundles that made the synthetic images."""
    names = records.lineages("bundle")
    return f"Synthetic images by {listed(names)}." if names else None


def generator(records: Records) -> str | None:
    """Bundle, weights and settings that made the synthetic images."""
    if not records.synthetic:
        return None
    weights, configs = records.lineages("weights_sha256"), records.lineages("config_sha256")
    parts = [f"Bundle {listed(records.lineages('bundle')) or 'unknown'}"]
    parts += [f"weights sha256 {listed(weights)}"] if weights else []
    parts += [f"settings sha256 {listed(configs)}"] if len(configs) in (1, 2) else []
    seeds = records.lineages("seed")
    parts += [f"seed {listed(seeds)}" if len(seeds) <= 5 else f"{len(seeds)} seeds"] if seeds else []
    return "; ".join(parts) + "."


def model(records: Records) -> str | None:
    """The generator's network and process, from its run; that of a GAN is two networks."""
    run = records.run
    if run is None:
        return None
    parts = {name: run["settings"][name] for name in ("network", "diffusion", "generator", "critic") if run["settings"].get(name)}
    if not parts:
        return None
    return f"Bundle {run['bundle']}, {run['image_size']} px, {counted(run['channels'], 'channel')}; {settings(parts)}."


def training(records: Records) -> str | None:
    """How the generator was trained, from its run."""
    run = records.run
    if run is None:
        return None
    return (
        f"The generator was trained for {counted(run['iterations'], 'iteration')} with seed {run['seed']} on "
        f"{counted(len(run['fit_groups']), 'group')}; {settings(run['settings'].get('training') or {})}."
    )


def training_data(records: Records) -> str | None:
    """The data of the run."""
    run = records.run
    if run is None:
        return None
    groups = f"{counted(len(run['fit_groups']), 'group')}, sha256 of their list {run['fit_on']}"
    return f"Training split of the cohort with content sha256 {run['cohort_sha256']}: {groups}."


def run_identity(records: Records) -> str | None:
    """Hashes that name the run."""
    run = records.run
    return None if run is None else f"Weights sha256 {run['weights_sha256']}, settings sha256 {run['config_sha256']}."


def sampling(records: Records) -> str | None:
    """Sampler settings, if all synthetic images share them; those of the run where the images do not say."""
    found = [sampler for case in records.synthetic if (sampler := (case.lineage or {}).get("sampler"))]
    shown = sorted({settings(sampler) for sampler in found})
    if not found and records.run is not None and records.run["settings"].get("sampler"):
        shown = [settings(records.run["settings"]["sampler"])]
    if not shown:
        return None
    return (
        f"Sampled with {shown[0]}."
        if len(shown) == 1
        else f"{len(shown)} sampler settings were used; every image's lineage holds its own."
    )


# Lineage says so of images made elsewhere, of a generator and of a label network that a user vouched for.
_UNKNOWN_ORIGIN = ("untrusted", "generator_trusted", "weights_trusted")


def held_out(records: Records) -> str | None:
    """Whether the generator and filter behind the images saw held-out groups."""
    if not records.synthetic:
        return None
    unknown = sum(any((case.lineage or {}).get(flag) for flag in _UNKNOWN_ORIGIN) for case in records.synthetic)
    seen = len(set().union(*records.described.fit_on.values())) if records.described.fit_on else 0
    what, was = ("The generator", "was") if records.gate is None else ("Generator and filter", "were")
    parts = [f"{what} {was} fitted on {counted(seen, 'group')}."] if seen else []
    if records.real is not None and seen and not unknown:
        parts.append("None of them is in the validation or test split of the real cohort.")
    if unknown:
        parts.append(f"Of {counted(unknown, 'image')} nothing shows what weights behind them were first trained on.")
    return " ".join(parts) or None


def gate_checks(records: Records) -> str | None:
    """The checks of the gate with their settings."""
    config: dict[str, Any] = dict((records.gate or {}).get("config") or {})
    if not config:
        return None
    named = dict(config.get("settings") or {})
    checks = [f"{name} ({settings(named[name])})" if name in named else str(name) for name in config.get("checks", ())]
    keys = ("threshold", "network", "seed", "calibrate")
    review = " Decisions of readers were applied." if "review" in config else ""
    return f"The gate ran {listed(checks)}; {settings({key: config[key] for key in keys if key in config})}.{review}"


def gate_acceptance(records: Records) -> str | None:
    """How many images passed, and why the others did not."""
    rows = (records.gate or {}).get("acceptance")
    if not rows:
        return None
    accepted, generated = sum(row["accepted"] for row in rows), sum(row["generated"] for row in rows)
    codes = listed(f"{code} {count}" for code, count in ((records.gate or {}).get("reasons") or {}).items())
    reasons = f" Reasons against images: {codes}." if codes else ""
    short = listed(row["name"] for row in rows if row.get("short"))
    return f"{accepted} of {counted(generated, 'image')} accepted ({accepted / generated:.1%}).{reasons}" + (
        f" Classes short of their quota: {short}." if short else ""
    )


def gate_copies(records: Records) -> str | None:
    """Near-copies of training images among all generated ones."""
    gate = records.gate or {}
    found = gate.get("near_copies") or gate.get("copies")
    if not found:
        return None
    spaces = listed(
        f"{entry.get('space', name)} below {figure(entry['threshold'])}"
        for name, entry in (gate.get("copy_spaces") or {}).items()
    )
    where = f" Distances that count as a copy: {spaces}." if spaces else ""
    return (
        f"{found['copies']} of {found['n']} generated images lay nearer to a training image than new images do "
        f"(rate {figure(found['rate'])}, 95 % interval {figure(found['low'])} to {figure(found['high'])}); such images are not accepted.{where}"
    )


def gate_labels(records: Records) -> str | None:
    """What confirmed the labels of the synthetic images."""
    found = (records.gate or {}).get("filter")
    if not found:
        return None
    held = found.get("validation") or {}
    score = (
        f"; on {held['n']} real validation images its balanced accuracy is {figure(held['balanced_accuracy'])}" if held else ""
    )
    given = (records.gate or {}).get("config", {}).get("label") == "amst"
    how = "that several heads of a classifier agree on (AMST)" if given else "it was generated for, confirmed by a classifier"
    network = f"{found['network']}, " if found.get("network") else ""
    return (
        f"A synthetic image carries the class {how}. The classifier ({network}weights sha256 {found['weights_sha256']}) was trained on "
        f"real training images{score}."
    )


def fidelity(records: Records) -> str | None:
    """Kernel distances that the gate measured, beside the floor between real sets."""
    rows = (records.gate or {}).get("fidelity")
    if not rows:
        return None
    values = listed(f"{row['pair']} {figure(row['value'])}" + (f" ({row['note']})" if row.get("note") else "") for row in rows)
    return f"Kernel inception distance in features {rows[0]['extractor']}: {values}."


def membership(records: Records) -> str | None:
    """Whether the generator's loss tells its training images from others."""
    found = (records.gate or {}).get("membership")
    if not found or "auc" not in found:
        return None
    interval = f"{figure(found['low'])} to {figure(found['high'])}"
    return f"The generator's loss tells training images from validation images with AUC {figure(found['auc'])} ({interval}; 0.5 means not)."


def evaluation(records: Records) -> str | None:
    """Figures of `metrics.json`."""
    found = records.metrics
    if found is None:
        return None
    names = ("kid", "kid_floor", "precision", "recall", "density", "coverage", "label_agreement", "judge_test_balanced_accuracy")
    values = [f"{name} {figure(found[name])}" + _because(found, name) for name in names if name in found]
    return f"{found['samples']} samples against {found['test_images']} real test images: {listed(values)}."


def _because(found: Any, name: str) -> str:
    return f" ({found[f'{name}_note']})" if found.get(f"{name}_note") else ""


def set_version(records: Records) -> str | None:
    """The medaug that wrote the described set, and the one that trained the generator."""
    made = records.described.created_by
    parts = [f"Set written by medaug {made['version']} ({made.get('command', 'unknown command')})"] if "version" in made else []
    parts += [f"generator trained by medaug {records.run['version']}"] if records.run and records.run.get("version") else []
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if parts else None

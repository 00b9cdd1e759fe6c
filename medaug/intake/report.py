"""What intake found, as JSON for programs and as one HTML file with pictures for people."""

from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from medaug import __version__
from medaug.cohort import SPLITS, Case, Cohort
from medaug.intake import volumes
from medaug.intake.assemble import Assembly
from medaug.intake.read import Suspect
from medaug.io import raster
from medaug.transforms.prepare import square

TILE = 72  # side of a picture on a sheet, in screen pixels
PER_CLASS = 24
LARGEST_GROUPS = 8
PER_GROUP = 12
LISTED_ROWS = 500

INTENSITY_TEXT = {
    "uint8": "0 and 1 are the values 0 and 255 of the 8-bit pictures.",
    "window_hu": "0 and 1 are {0} and {1} Hounsfield units; values outside are cut off.",
    "window_stored": "0 and 1 are the stored values {0} and {1}; values outside are cut off.",
    "percentile": "0 and 1 are the 0.5 and 99.5 percentile of each image: the values are in every case's acquisition, "
    "and intensities of two images cannot be compared.",
    "mixed": "The images were scaled in different ways: see every case's acquisition. A network can mistake that for the class.",
}


def content(cohort: Cohort, counts: dict[str, Any], assembly: Assembly, quarantine: list[dict[str, str]]) -> dict[str, Any]:
    """The content of report.json. No path, no patient's data."""
    return {
        "name": cohort.name,
        "medaug": __version__,
        "modality": cohort.modality,
        "classes": list(cohort.classes),
        "ordinal": cohort.ordinal,
        "image_size": cohort.image_size,
        "channels": cohort.channels,
        "spatial_dims": cohort.spatial_dims,
        "intensity": dict(cohort.intensity),
        "created_by": dict(cohort.created_by),
        "source": cohort.source,
        "counts": counts,
        "groups": assembly.groups,
        "leak": assembly.leak,
        "agreement": assembly.agreement,
        "notes": assembly.notes,
        "quarantine": quarantine,
    }


def html(data: dict[str, Any], cohort: Cohort, assembly: Assembly, suspects: Sequence[Suspect] = ()) -> str:
    """The report as one self-contained HTML page; the cohort's images must be in its folder."""
    import jinja2

    template = resources.files("medaug.intake").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    intensity = cohort.intensity
    return environment.from_string(template).render(
        report=data,
        splits=SPLITS,
        class_totals={name: sum(data["counts"]["splits"][split][name] for split in SPLITS) for name in cohort.classes},
        totals={split: sum(data["counts"]["splits"][split].values()) for split in SPLITS},
        sheets=[(name, class_sheet(cohort, label)) for label, name in enumerate(cohort.classes)],
        groups=group_rows(cohort),
        figure=group_figure(cohort, assembly),
        intensity=INTENSITY_TEXT[intensity["kind"]].format(intensity["0"], intensity["1"]),
        listed=data["quarantine"][:LISTED_ROWS],
        suspects=[(found, "" if found.thumbnail is None else _picture(found.thumbnail)) for found in suspects],
    )


def _picture(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return _data_uri(buffer.getvalue())


def class_sheet(cohort: Cohort, label: int) -> str:
    """A sheet of a class as a data URI: images of as many groups as possible."""
    seen: Counter[str] = Counter()
    ranked = []
    for case in sorted((case for case in cohort.cases() if case.label == label), key=lambda case: case.id):
        ranked.append((seen[case.group], case.id, case))
        seen[case.group] += 1
    chosen = [case for _, _, case in sorted(ranked, key=lambda entry: entry[:2])[:PER_CLASS]]
    return _sheet(cohort, chosen, 12)


def group_rows(cohort: Cohort) -> list[dict[str, Any]]:
    """The largest groups with more than one image: name, size, split, classes and a strip of pictures."""
    members: dict[str, list[Case]] = defaultdict(list)
    home = {case.group: split for split in SPLITS for case in cohort.split(split)}
    for case in cohort.cases():
        members[case.group].append(case)
    largest = sorted((group for group in members if len(members[group]) > 1), key=lambda group: (-len(members[group]), group))
    rows = []
    for group in largest[:LARGEST_GROUPS]:
        cases = sorted(members[group], key=lambda case: case.id)
        classes = Counter(cohort.classes[case.label] for case in cases)
        names = ", ".join(f"{name} {count}" for name, count in classes.most_common())
        rows.append(
            {
                "name": group,
                "size": len(cases),
                "split": home[group],
                "classes": names,
                "sheet": _sheet(cohort, cases[:PER_GROUP], PER_GROUP),
            }
        )
    return rows


def _sheet(cohort: Cohort, cases: Sequence[Case], columns: int) -> str:
    columns = max(1, min(columns, len(cases)))
    rows = -(-len(cases) // columns)
    sheet = Image.new("RGB", (columns * (TILE + 2), max(rows, 1) * (TILE + 2)), "white")
    for index, case in enumerate(cases):
        pixels = np.rint(_shown(cohort, case) * 255).astype(np.uint8)
        tile = Image.fromarray(pixels).convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
        sheet.paste(tile, (index % columns * (TILE + 2), index // columns * (TILE + 2)))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return _data_uri(buffer.getvalue())


def _shown(cohort: Cohort, case: Case) -> np.ndarray:
    """The image of a case; of a volume the middle slice, made square."""
    if cohort.spatial_dims == 2:
        return raster.read_unit_png(cohort.path(case))
    volume = volumes.read(cohort.path(case))
    return square(volume[len(volume) // 2], TILE)[0]


def group_figure(cohort: Cohort, assembly: Assembly) -> str:
    """Sizes of the groups and, where groups were found from pixels, the neighbour distances with the threshold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    distances = assembly.neighbour_distances[np.isfinite(assembly.neighbour_distances)]
    threshold = assembly.groups.get("threshold")
    figure = Figure(figsize=(9, 2.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if threshold is not None else 1, squeeze=False)[0]
    sizes = Counter(Counter(case.group for case in cohort.cases()).values())
    axes[0].bar(list(sizes), list(sizes.values()), color="#2a6f97")
    axes[0].set(xlabel="images in a group", ylabel="groups")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].yaxis.get_major_locator().set_params(integer=True)
    if threshold is not None:
        axes[1].hist(distances, bins=40, color="#8aa29e")
        axes[1].axvline(threshold, color="#c1121f", label="linkage threshold")
        axes[1].set(xlabel="distance to the nearest neighbour", ylabel="images")
        axes[1].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return _data_uri(buffer.getvalue())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")

"""The sheet of accepted synthetic images: a panel for each set of images, a line for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medaug import storage
from medaug.cohort import FILE_NAME, Case, Cohort, read_cohort
from medaug.errors import DataError
from medaug.grading.figures import literal, new_figure, png
from medaug.quality.report import contact_sheet
from medaug.quality.thumbnails import read_image
from medaug.results.sources import is_page

SAMPLES_NAME = "samples.png"
PER_CLASS = 12
ACCEPTED = "accepted"
GENERATORS = "generators"

__all__ = ["PER_CLASS", "SAMPLES_NAME", "samples_png"]


def samples_png(folder: Path, classes: Sequence[str]) -> bytes:
    """The sheet of a folder of `medaug experiment` or `augment`, or the one that a page has, as a PNG file.

    Only sets whose gate looked for copies of training images are shown: the others may be pictures of patients.

    Raises:
        DataError: `samples-missing`: the folder holds no accepted images.  `samples-unchecked`: no set was looked at for copies.
    """
    folder = Path(folder)
    if is_page(folder):
        if not (folder / SAMPLES_NAME).is_file():
            raise DataError(
                "samples-missing", f"The page {folder.name} has no {SAMPLES_NAME}; write it from the experiment's folder."
            )
        return (folder / SAMPLES_NAME).read_bytes()
    # The main job has one set, an experiment one for each row, under feedback/ for a row that was made in rounds.
    root = _first_generator(folder)
    which = "" if root is folder else f", seed {root.name}"
    places = {place: place.name + which for place in sorted((root / ACCEPTED).glob("*/"))}
    places |= {place: place.parent.name + which for place in sorted(root.glob(f"feedback/*/{ACCEPTED}/"))}
    if (folder / ACCEPTED / FILE_NAME).is_file():
        places = {folder / ACCEPTED: ""}
    found = {title: read_cohort(place) for place, title in places.items() if (place / FILE_NAME).is_file()}
    sets = {title: made for title, made in found.items() if made.training}
    if not sets:
        raise DataError(
            "samples-missing",
            f"{folder.name} holds no accepted images; --samples needs a folder of `medaug experiment` or `medaug augment`.",
        )
    sets = {title: made for title, made in sets.items() if all(_looked_at(case) for case in made.training)}
    if not sets:
        raise DataError(
            "samples-unchecked",
            "No gate looked for copies of training images, so no image is shown; gate with the check `copies`, or leave --samples out.",
        )
    # In inches, placed by hand: a layout engine cuts long names of classes off beside panels of a fixed aspect.
    names, side, panel, title_height = 0.065 * max(map(len, classes)) + 0.25, 0.5 * PER_CLASS, 0.5 * len(classes), 0.35
    width, height = names + side + 0.1, (panel + title_height) * len(sets) + 0.1
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    for place, (title, made) in enumerate(sets.items(), start=1):
        bottom = height - place * (panel + title_height)
        axis = figure.add_axes((names / width, bottom / height, side / width, panel / height))
        sheet = contact_sheet([_spread(made, label) for label in range(len(classes))], PER_CLASS, made.image_size, made.channels)
        step = sheet.shape[0] / len(classes)
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axis.set_yticks([step * (label + 0.5) for label in range(len(classes))], [literal(name) for name in classes], fontsize=8)
        axis.set_xticks([])
        for label in set(range(len(classes))) - {case.label for case in made.training}:
            axis.text(0.02 * sheet.shape[1], step * (label + 0.5), "none accepted", va="center", fontsize=8, color="#57606a")
        axis.set_title(title, fontsize=9, loc="left")
        axis.spines[:].set_visible(False)
    return png(figure)


def _first_generator(folder: Path) -> Path:
    """Where the images of the first seed are if each has its own; else the folder itself."""
    path = folder / "experiment.json"
    experiment = storage.read_json(path) if path.is_file() else None
    places = sorted(folder.glob(f"{GENERATORS}/*/"), key=lambda place: (len(place.name), place.name))
    own = isinstance(experiment, dict) and experiment.get("generator_per_seed")
    return places[0] if own and places else folder


def _looked_at(case: Case) -> bool:
    """True if the check `copies` has measured how near the image is to a training image."""
    return (case.lineage or {}).get("nearest_training_distance") is not None


def _spread(made: Cohort, label: int) -> list[np.ndarray | None]:
    """Images of a class, spread evenly over those that were accepted."""
    own: list[Case] = [case for case in made.training if case.label == label]
    places = np.linspace(0, len(own) - 1, min(PER_CLASS, len(own))).round().astype(int)
    return [read_image(made, own[place]) for place in places]

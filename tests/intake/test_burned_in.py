"""Burned-in text: how often drawn text is missed and clean pictures are suspected, and that masks and thumbnails hide it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from medaug.draws import numpy_generator
from medaug.intake.burned_in import find_text, masked, suspect, thumbnail
from medaug.phantom import draw_cohort

TEXTS = (
    "DOE^JANE 19530917",
    "ID: 0047113",
    "Mueller, Hans",
    "12.03.2021 14:07",
    "ST. ELSEWHERE HOSPITAL",
    "ACC7731204",
    "SE 3 IM 42",
)


@pytest.fixture(scope="module")
def clean() -> list[np.ndarray]:
    """Drawn chest slices in Hounsfield units, with scanner noise of 0 to 60 HU."""
    pictures = []
    for size, patients in ((128, 20), (256, 12), (512, 8)):
        for drawn in draw_cohort(patients, size, 5):
            noise = numpy_generator("burned-in", size, drawn.patient, drawn.index)
            pictures.append(drawn.hounsfield + noise.normal(0, (drawn.patient % 4) * 20, drawn.hounsfield.shape))
    return [picture.astype(np.float32) for picture in pictures]


def with_text(picture: np.ndarray, text: str, *key: object) -> tuple[np.ndarray, np.ndarray]:
    """The picture with the text, and where its ink is: any place, 8 to 28 pixels high, bright or dark, smooth or hard."""
    draw = numpy_generator("text", text, *key)
    side = picture.shape[0]
    size = int(draw.integers(10, max(12, min(36, side // 10))))
    font = ImageFont.load_default(size)
    ink = Image.new("L", (side, side))
    pen = ImageDraw.Draw(ink)
    pen.fontmode = "1" if draw.uniform() < 0.5 else "L"
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    while right > 0.95 * side:
        text = text[:-1]
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    x = int(draw.integers(2, max(3, side - right - 2)))
    y = int(draw.integers(2, max(3, side - bottom - 2)))
    if draw.uniform() < 0.6:  # near a border, as devices write it
        y = int(draw.choice([2, max(3, side - bottom - 3)]))
    pen.text((x, y), text, fill=255, font=font)
    share = np.asarray(ink, dtype=np.float32) / 255
    value = picture.max() if draw.uniform() < 0.8 else picture.max() * 0.7 + picture.min() * 0.3
    return picture * (1 - share) + value * share, share > 0.5


def test_false_positive_rate_on_clean_pictures(clean: list[np.ndarray]) -> None:
    suspected = [index for index, picture in enumerate(clean) if find_text(picture)]
    assert len(clean) >= 60
    assert len(suspected) <= 0.03 * len(clean)


def test_false_negative_rate_on_drawn_text(clean: list[np.ndarray]) -> None:
    missed, inked, covered = 0, 0, 0
    trials = [(picture, text, number) for number, picture in enumerate(clean) for text in TEXTS[number % 3 :: 3]]
    for picture, text, number in trials:
        burnt, ink = with_text(picture, text, number)
        boxes = find_text(burnt)
        missed += not boxes
        inside = np.zeros(ink.shape, bool)
        for top, left, bottom, right in boxes:
            inside[top:bottom, left:right] = True
        inked += int(ink.sum())
        covered += int((ink & inside).sum())
    assert missed <= 0.05 * len(trials), f"{missed} of {len(trials)} missed"
    assert covered >= 0.9 * inked, f"{covered / inked:.3f} of the ink covered"


@pytest.mark.parametrize("text", ["L", "R", "PA"])
def test_side_markers_are_no_text(clean: list[np.ndarray], text: str) -> None:
    burnt = [with_text(picture, text, number)[0] for number, picture in enumerate(clean[-12:])]
    assert sum(bool(find_text(picture)) for picture in burnt) <= 1


@pytest.mark.parametrize("side", [64, 128])
def test_noise_is_no_text(side: int) -> None:
    pictures = [numpy_generator("noise", side, number).integers(0, 2000, (side, side)) for number in range(24)]
    assert sum(bool(find_text(picture)) for picture in pictures) <= 2


def test_text_of_a_line_is_found_on_noise() -> None:
    ink = Image.new("L", (256, 256))
    ImageDraw.Draw(ink).text((10, 40), "DOE JANE 19530917", fill=255, font=ImageFont.load_default(20))
    noise = numpy_generator("noise", "text").integers(0, 1000, (256, 256))
    assert find_text(np.maximum(noise, np.asarray(ink, dtype=np.int64) * 8))


@pytest.mark.parametrize("change", ["flat", "tiny", "noise", "stripes"])
def test_what_is_not_text(change: str) -> None:
    generator = numpy_generator("not-text", change)
    picture = {
        "flat": np.zeros((128, 128)),
        "tiny": generator.uniform(size=(28, 28)),
        "noise": generator.normal(size=(256, 256)),
        "stripes": np.tile((np.arange(256) // 8 % 2).astype(float), (256, 1)),
    }[change]
    assert find_text(picture) == []


@pytest.mark.parametrize(
    ("header", "reasons"),
    [
        ({"burned_in": "YES"}, ("declared",)),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.7"}, ("object",)),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.7.2"}, ("object",)),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.6.1", "burned_in": "YES"}, ("declared", "object")),
        ({"image_type": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, ("object",)),
    ],
)
def test_headers_that_are_suspected(header: dict, reasons: tuple[str, ...]) -> None:
    found = suspect(np.zeros((128, 128)), header)
    assert found is not None and found.reasons == reasons and found.boxes == ()


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"burned_in": "NO", "sop_class": "1.2.840.10008.5.1.4.1.1.7"},
        {"sop_class": "1.2.840.10008.5.1.4.1.1.2", "image_type": ["DERIVED", "SECONDARY", "AXIAL"]},
        {"sop_class": "1.2.840.10008.5.1.4.1.1.77.1.1"},
    ],
)
def test_headers_that_are_not(header: dict) -> None:
    assert suspect(np.zeros((128, 128)), header) is None


def test_a_header_that_says_no_does_not_stop_the_search(clean: list[np.ndarray]) -> None:
    found = suspect(with_text(clean[-1], TEXTS[0], 1)[0], {"burned_in": "NO"})
    assert found is not None and found.reasons == ("pixels",)


def test_mask_and_thumbnail_keep_nothing_of_the_text(clean: list[np.ndarray]) -> None:
    picture = clean[-1]
    burnt, ink = with_text(picture, TEXTS[0], 3)
    boxes = find_text(burnt)
    hidden = masked(burnt, boxes)
    assert find_text(hidden) == [] and hidden[ink].max() <= np.median(picture)
    shown, without = thumbnail(burnt, boxes), thumbnail(np.where(ink, burnt.min(), burnt), boxes)
    # With and without the ink the thumbnails are the same up to the grey scale, which the ink may stretch a little.
    assert shown.shape == (96, 96, 3) and np.abs(shown.astype(int) - without.astype(int)).max() <= 3

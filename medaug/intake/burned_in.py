"""Text in the pixels: what the header admits, what the object's kind suggests, and what looks like lines of letters.

Letters are found as what they are: small connected strokes of about one height, of hard contrast on both sides, standing in
a row at regular distances. A side marker of one or two lead letters is no row; three letters are. The search is a safety net, not a proof:
`tests/intake/test_burned_in.py` measures how often it misses drawn text and how often it suspects pictures without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medaug.io.blocks import row_blocks

Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two are outside

MIN_SIDE = 64  # pixels; smaller pictures cannot hold a legible name
MIN_LETTERS = 3
TILE = 16
STRONG = 0.22  # share of the intensity range that a stroke's edge crosses
NOISY = 0.9  # share of the tiles with that many edges: then chance puts strokes in a row all over the picture
LONG = 6  # letters of a row that is believed in such a picture
BUSY = 24  # strong edges in a tile of 16 x 16 pixels that holds letters
# PS3.4 B.5 and its retired classes: Secondary Capture, ultrasound, angiography and fluoroscopy, photographs and
# ophthalmic pictures, which are taken from screens or stamped by the device.
RISKY_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.7",
    "1.2.840.10008.5.1.4.1.1.3",
    "1.2.840.10008.5.1.4.1.1.6",
    "1.2.840.10008.5.1.4.1.1.12.1",
    "1.2.840.10008.5.1.4.1.1.12.2",
    "1.2.840.10008.5.1.4.1.1.77.1.4",
    "1.2.840.10008.5.1.4.1.1.77.1.5",
)
RISKY_TYPES = frozenset(
    {"SCREEN SAVE", "SCREENSHOT", "SCREEN CAPTURE", "SCANNED", "DOSE_INFO", "DOSE INFO", "PROTOCOL", "REPORT"}
)


@dataclass(frozen=True)
class Suspicion:
    """Why a picture may hold burned-in text, and where.

    Attributes:
        reasons: "declared" (BurnedInAnnotation YES), "object" (its SOP class or image type), "pixels" (rows of letters).
        boxes: where the rows of letters are, with a margin.
    """

    reasons: tuple[str, ...]
    boxes: tuple[Box, ...] = ()


def suspect(pixels: np.ndarray, header: Mapping[str, Any]) -> Suspicion | None:
    """What speaks for burned-in text; None if nothing does.

    Args:
        pixels: (H, W) or (H, W, 3) as read.
        header: `burned_in` (value of (0028,0301)), `sop_class`, `image_type`; empty for files that are not DICOM.

    An object of a risky kind whose header says BurnedInAnnotation NO is not suspected for its kind. The pixels are
    searched all the same: headers err.
    """
    boxes = tuple(find_text(pixels))
    declared = str(header.get("burned_in", "")).strip().upper()
    reasons = ["declared"] if declared == "YES" else []
    if declared != "NO" and _is_risky(header):
        reasons.append("object")
    if boxes:
        reasons.append("pixels")
    return Suspicion(tuple(reasons), boxes) if reasons else None


def explain(found: Suspicion, policy: str) -> str:
    """Why a picture was left out, for the quarantine."""
    texts = {
        "declared": "its header says BurnedInAnnotation YES",
        "object": "objects of its kind often hold text",
        "pixels": "rows of letters were found in it",
    }
    why = " and ".join(texts[reason] for reason in found.reasons)
    if policy == "mask":
        return f"The pixels may hold text ({why}), but nothing says where; look at it, or keep it with --burned-in keep."
    return f"The pixels may hold text ({why}); --burned-in mask or keep takes it in."


def _is_risky(header: Mapping[str, Any]) -> bool:
    sop_class = str(header.get("sop_class", ""))
    by_class = any(sop_class == root or sop_class.startswith(root + ".") for root in RISKY_CLASSES)
    return by_class or bool(RISKY_TYPES & {str(value).strip().upper() for value in header.get("image_type", ())})


def find_text(pixels: np.ndarray) -> list[Box]:
    """Boxes around rows of at least three letter-like strokes, bright on dark or dark on bright.

    Args:
        pixels: (H, W) or (H, W, 3) of any number type and range.

    Returns:
        boxes within the picture, sorted, with a margin of a letter or more. Text of 6 to about 64 pixels height.
    """
    grey = pixels.mean(axis=-1, dtype=np.float32) if pixels.ndim == 3 else np.asarray(pixels, dtype=np.float32)
    own = not np.may_share_memory(grey, pixels)
    if min(grey.shape) < MIN_SIDE:
        return []
    low = float(grey.min())
    span = float(grey.max()) - low
    if span <= 0 or not np.isfinite(span):
        return []
    edges = _edges_per_tile(grey, STRONG * span)
    if edges.max(initial=0) < BUSY:
        # A few pixels of metal or noise can stretch the range: look again without them.
        low, high = (float(value) for value in np.percentile(grey[::4, ::4], (0.5, 99.5)))
        if high - low < 1e-6 * span or high - low > 0.7 * span:
            return []
        span = high - low
        grey = np.clip(grey, low, high)
        own = True
        edges = _edges_per_tile(grey, STRONG * span)
        if edges.max(initial=0) < BUSY:  # a quick no for most pictures
            return []
    # In place from here on: a large picture takes a quarter of a gigabyte each time.
    unit = np.subtract(grey, np.float32(low), out=grey if own else None)
    del grey
    unit /= np.float32(span)
    noisy = float((edges >= BUSY).mean()) > NOISY
    found: list[Box] = []
    for dark in (False, True):
        if dark:
            np.subtract(1, unit, out=unit)
        for strokes in _binarised(unit):
            found += _rows_of_letters(strokes, unit, noisy)
    return _merged(found, unit.shape[:2])


def _edges_per_tile(grey: np.ndarray, strong: float) -> np.ndarray:
    """How many steps of more than `strong` from a pixel to the next one in its row each tile of 16 x 16 holds."""
    height, width = (side // TILE * TILE for side in grey.shape)
    edges = np.zeros((height, width), dtype=bool)
    steps = np.subtract(grey[:height, 1:width], grey[:height, : width - 1])
    np.greater(np.abs(steps, out=steps), np.float32(strong), out=edges[:, :-1])
    if np.count_nonzero(edges) < BUSY:
        return np.zeros((height // TILE, width // TILE), dtype=np.uint16)
    by_column = edges.view(np.uint8).reshape(height // TILE, TILE, width).sum(axis=1, dtype=np.uint8)
    return by_column.reshape(height // TILE, width // TILE, TILE).sum(axis=2, dtype=np.uint16)


def _binarised(image: np.ndarray) -> Iterator[np.ndarray]:
    """Candidates for strokes: what is about as bright as anything, and what stands out of its surroundings."""
    from scipy import ndimage

    yield image > 0.6
    yield image > 0.85
    for size in (9, 25):
        background = ndimage.uniform_filter(image, size)
        background += STRONG
        strokes = image > background
        del background
        yield strokes


def _rows_of_letters(strokes: np.ndarray, image: np.ndarray, noisy: bool) -> list[Box]:
    """Rows of letters; in a noisy picture only those longer than what chance makes of its strokes, read along columns."""
    rows = _chains(_letters(strokes, image))
    if rows and noisy:
        chance = max((number for number, _ in _chains(_letters(strokes.T, image.T))), default=0)
        rows = [(number, box) for number, box in rows if number >= max(LONG, chance + MIN_LETTERS)]
    return [box for _, box in rows]


def _letters(strokes: np.ndarray, image: np.ndarray) -> list[Box]:
    from scipy import ndimage

    labels, number = ndimage.label(strokes, structure=np.ones((3, 3)))
    if not 0 < number <= 20_000:
        return []
    areas = np.zeros(number + 1, dtype=np.intp)
    for block in row_blocks(labels):
        areas += np.bincount(labels[block].ravel(), minlength=number + 1)
    letters = []
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        top, bottom, left, right = place[0].start, place[0].stop, place[1].start, place[1].stop
        height, width = bottom - top, right - left
        if not (5 <= height <= 64 and 1 <= width <= 2.0 * height) or not 0.15 <= areas[label] / (height * width) <= 1.0:
            continue
        if width >= 3 and areas[label] / (height * width) > 0.9:
            continue  # a filled rectangle is no letter, unless it is a stroke as wide as I or l
        if _contrast(labels, label, place, image) >= STRONG:
            letters.append((top, left, bottom, right))
    return letters


def _contrast(labels: np.ndarray, label: int, place: tuple[slice, slice], image: np.ndarray) -> float:
    """Median difference between a stroke and the pixels around it, in a frame one pixel larger."""
    rows = slice(max(place[0].start - 1, 0), place[0].stop + 1)
    columns = slice(max(place[1].start - 1, 0), place[1].stop + 1)
    own = labels[rows, columns] == label
    around = image[rows, columns][labels[rows, columns] == 0]
    return float(np.median(image[rows, columns][own]) - np.median(around)) if around.size else 0.0


def _chains(letters: Sequence[Box]) -> list[tuple[int, Box]]:
    """Chains of neighbours of like height on one line, with their numbers of letters.

    Each letter goes on with the nearest one to its right.
    """
    ordered = sorted(letters, key=lambda box: (box[1], box[0]))
    following = [-1] * len(ordered)
    lefts = np.array([box[1] for box in ordered])
    for index, (top, _, bottom, right) in enumerate(ordered):
        height = bottom - top
        end = int(np.searchsorted(lefts, right + 1.2 * height, side="right"))
        for other in range(index + 1, end):
            box = ordered[other]
            other_height = box[2] - box[0]
            if box[1] < right - 1 or not 0.7 <= other_height / height <= 1 / 0.7:
                continue
            # One baseline (or, for letters with a descender, one top line).
            off = min(abs(box[2] - bottom), abs(box[0] - top))
            if off <= max(1, 0.15 * height):
                following[index] = other
                break
    has_previous = set(following)
    found = []
    for start in range(len(ordered)):
        if start in has_previous:
            continue
        chain = [start]
        while following[chain[-1]] >= 0:
            chain.append(following[chain[-1]])
        if len(chain) >= MIN_LETTERS and _is_even([ordered[index] for index in chain]):
            found.append((len(chain), _around([ordered[index] for index in chain])))
    return found


def _is_even(chain: Sequence[Box]) -> bool:
    """Letters share a line: three must agree closely, a longer row may hold capitals, descenders and stops."""
    bottoms = np.array([box[2] for box in chain], dtype=float)
    heights = np.array([box[2] - box[0] for box in chain], dtype=float)
    height = float(np.median(heights))
    on_line = np.abs(bottoms - np.median(bottoms)) <= max(1.0, 0.12 * height)
    alike = np.abs(heights - height) <= max(1.0, 0.2 * height)
    widths = np.array([box[3] - box[1] for box in chain], dtype=float)
    enough = int((on_line & alike).sum())
    return bool(enough >= MIN_LETTERS and enough >= 0.6 * len(chain) and np.median(widths) >= 0.2 * height)


def _around(boxes: Sequence[Box]) -> Box:
    return min(b[0] for b in boxes), min(b[1] for b in boxes), max(b[2] for b in boxes), max(b[3] for b in boxes)


def _merged(boxes: Sequence[Box], shape: tuple[int, ...]) -> list[Box]:
    """Boxes with a margin, for words and lines beside them: three letters' heights to the sides, one above and below."""
    grown: list[Box] = []
    for box in sorted(set(boxes)):
        top, left, bottom, right = box
        height = bottom - top
        grown.append(
            (
                max(top - height - 1, 0),
                max(left - 3 * height - 1, 0),
                min(bottom + height + 1, shape[0]),
                min(right + 3 * height + 1, shape[1]),
            )
        )
    joined = True
    while joined:
        joined = False
        rest: list[Box] = []
        for box in grown:
            touching = next((index for index, other in enumerate(rest) if _overlap(box, other)), None)
            if touching is None:
                rest.append(box)
            else:
                rest[touching], joined = _around([rest[touching], box]), True
        grown = rest
    return sorted(grown)


def _overlap(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def masked(pixels: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """A copy with the boxes set to the picture's smallest value, which padding has too."""
    result = pixels.copy()
    for top, left, bottom, right in boxes:
        result[top:bottom, left:right] = pixels.min()
    return result


def thumbnail(pixels: np.ndarray, boxes: Sequence[Box], side: int = 96) -> np.ndarray:
    """A small picture for people, uint8 (side, side, 3): the suspicious boxes are black with a red frame, never legible.

    The black is painted before the picture is made small, so that not even a blur of the letters is left.
    """
    from PIL import Image, ImageDraw

    grey = pixels.mean(axis=-1) if pixels.ndim == 3 else pixels
    low, high = (float(value) for value in np.percentile(grey, (1, 99)))
    levels = np.empty(grey.shape, dtype=np.uint8)
    for block in row_blocks(grey):
        unit = np.clip((grey[block] - low) / (high - low if high > low else 1.0), 0, 1)
        levels[block] = np.rint(unit * 255)
    for top, left, bottom, right in boxes:
        levels[top:bottom, left:right] = 0
    image = Image.fromarray(levels).convert("RGB")
    scale = side / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX)
    draw = ImageDraw.Draw(small)
    for top, left, bottom, right in boxes:
        corner = (max(right * scale - 1, left * scale), max(bottom * scale - 1, top * scale))  # of a long strip less than a pixel
        draw.rectangle((left * scale, top * scale, *corner), fill=(0, 0, 0), outline=(193, 18, 31))
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return np.asarray(canvas)

"""The drawing behind the phantom: one patient's anatomy as shapes in Hounsfield units, from keyed draws alone.

Coordinates: x to the right of the picture (the left of a supine patient), y down (to the back), both -1 to 1 over the
field of view. Lengths are in these units unless a name says otherwise; densities are in Hounsfield units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter

from medaug.draws import numpy_generator

NUM_GRADES = 4
LOWEST_HU = -1024
AIR, FAT, MUSCLE, BLOOD, LUNG, TRACHEA = -1000.0, -100.0, 50.0, 45.0, -860.0, -1000.0
_NODULE_COUNT = ((0, 0), (1, 1), (3, 3), (5, 6))  # per grade, both ends included
_NODULE_RADIUS = ((0.0, 0.0), (0.095, 0.115), (0.090, 0.115), (0.100, 0.135))  # 6 to 9 pixels of 128
_SPICULATION = ((0.0, 0.0), (0.0, 0.25), (0.3, 0.65), (0.65, 1.0))


@dataclass(frozen=True)
class Nodule:
    """A nodule: centre, radius, density, spiculation 0 to 1, and the key of its outline."""

    x: float
    y: float
    radius: float
    density: float
    spiculation: float
    key: int


@dataclass(frozen=True)
class Anatomy:
    """What makes one patient different from the next; `level` 0 is at the top of the lungs, 1 at the diaphragm."""

    key: tuple[object, ...]
    half_width: float
    half_height: float
    fat: float
    wall: float
    level: float
    blood: float
    heart: float
    bone: float
    lung: float
    noise: float
    mediastinal_fat: float
    table: bool
    field_mm: float
    warp: np.ndarray  # (modes, 6): amplitude and phase in x and y, wave numbers


def draw_anatomy(key: tuple[object, ...]) -> Anatomy:
    """Draw the anatomy that belongs to a key."""
    random = numpy_generator(*key, "anatomy")
    between = random.uniform
    half_width = between(0.88, 0.95)
    warp = np.column_stack(
        [random.normal(0, 0.010, 4), random.uniform(0, 6.28, 4), random.normal(0, 0.010, 4), random.uniform(0, 6.28, 4)]
        + [random.uniform(-4, 4, 4), random.uniform(-4, 4, 4)]
    )
    return Anatomy(
        key=key,
        half_width=half_width,
        half_height=half_width * between(0.72, 0.82),
        fat=between(0.025, 0.09),
        wall=between(0.07, 0.10),
        level=between(0.25, 0.76),
        blood=BLOOD + (between(40, 130) if random.random() < 0.5 else 0.0),  # half of them with contrast agent
        heart=between(0.75, 1.05),
        bone=between(0.8, 1.2),
        lung=LUNG + between(-35, 45),
        noise=between(12, 26),
        mediastinal_fat=between(0.2, 0.9),
        table=bool(random.random() < 0.7),
        field_mm=round(between(320, 400), 1),
        warp=warp,
    )


class Grid:
    """Pixel centres (gently warped, so that no organ is a perfect ellipse) and the shapes drawn on them."""

    def __init__(self, size: int, warp: np.ndarray) -> None:
        centre = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        y, x = np.meshgrid(centre, centre, indexing="ij")
        self.size, self.pixel = size, 2 / size
        self.plain_x, self.plain_y = x, y
        waves = [(row, np.sin(row[4] * x + row[5] * y + row[1]), np.sin(row[5] * x - row[4] * y + row[3])) for row in warp]
        self.x = (x + sum(row[0] * along for row, along, _ in waves)).astype(np.float32)
        self.y = (y + sum(row[2] * across for row, _, across in waves)).astype(np.float32)

    def cover(self, distance: np.ndarray, soft: float = 1.0) -> np.ndarray:
        """Share of each pixel inside a shape, from the signed distance to its edge (negative inside)."""
        return np.clip(0.5 - distance / (self.pixel * soft), 0, 1)

    def ellipse(self, x: float, y: float, rx: float, ry: float, angle: float = 0.0, power: float = 2.0) -> np.ndarray:
        """Signed distance (first order) to a turned superellipse."""
        cos, sin = np.cos(angle), np.sin(angle)
        dx, dy = self.x - x, self.y - y
        u, v = (dx * cos + dy * sin) / rx, (dy * cos - dx * sin) / ry
        if power == 2:  # most shapes; the general case costs five times as much
            value = np.sqrt(u * u + v * v)
            return (value - 1) * value / np.maximum(np.sqrt((u / rx) ** 2 + (v / ry) ** 2), 1e-6)
        u, v = np.abs(u), np.abs(v)
        value = (u**power + v**power + 1e-9) ** (1 / power)
        slope = value ** (1 - power) * np.hypot(u ** (power - 1) / rx, v ** (power - 1) / ry)
        return (value - 1) / np.maximum(slope, 1e-6)

    def window(self, x: float, y: float, reach: float) -> tuple[slice, slice]:
        """Rows and columns within `reach` of a point, with room for the warp."""
        reach += 0.06
        low = [max(int((centre - reach + 1) / self.pixel), 0) for centre in (y, x)]
        high = [max(int((centre + reach + 1) / self.pixel) + 1, 0) for centre in (y, x)]
        return slice(low[0], high[0]), slice(low[1], high[1])

    def stroke(
        self, start: np.ndarray, end: np.ndarray, radius: float, end_radius: float
    ) -> tuple[tuple[slice, slice], np.ndarray]:
        """Window and cover of a tapered line; thinner than a pixel it fades instead of vanishing."""
        middle, along = (start + end) / 2, end - start
        length = float(np.hypot(*along))
        window = self.window(float(middle[0]), float(middle[1]), length / 2 + radius + self.pixel)
        dx, dy = self.x[window] - start[0], self.y[window] - start[1]
        share = np.clip((dx * along[0] + dy * along[1]) / max(length**2, 1e-9), 0, 1)
        width = radius + share * (end_radius - radius)
        distance = np.hypot(dx - share * along[0], dy - share * along[1]) - np.maximum(width, self.pixel / 2)
        return window, self.cover(distance) * np.minimum(2 * width / self.pixel, 1)


def _blend(image: np.ndarray, cover: np.ndarray, value: float | np.ndarray) -> None:
    image += cover * (value - image)


def _smooth_noise(key: tuple[object, ...], grid: Grid, scale: float) -> np.ndarray:
    """Unit-variance noise with a correlation length of `scale`."""
    noise = gaussian_filter(numpy_generator(*key).standard_normal((grid.size, grid.size)), scale / grid.pixel, mode="wrap")
    return (noise / noise.std()).astype(np.float32)


def _cavity(anatomy: Anatomy) -> tuple[float, float]:
    """Half axes of the chest cavity; it narrows towards the top of the lungs."""
    width = 1 - 0.18 * max(0.45 - anatomy.level, 0)
    return (anatomy.half_width - anatomy.fat - anatomy.wall) * width, (anatomy.half_height - anatomy.fat - anatomy.wall) * 1.02


def _spine_y(anatomy: Anatomy) -> float:
    return 0.50 * _cavity(anatomy)[1]


def _heart(anatomy: Anatomy) -> tuple[float, float, float, float, float]:
    """Centre, half axes and turn of the heart (below) or the great vessels (above)."""
    a, b = _cavity(anatomy)
    low = np.clip((anatomy.level - 0.35) / 0.4, 0, 1) * anatomy.heart
    return 0.06 * a + 0.16 * a * low, -0.18 * b - 0.02 * low, 0.17 * a + 0.24 * a * low, 0.34 * b + 0.14 * b * low, 0.5 * low


def _lung_distance(anatomy: Anatomy, grid: Grid) -> np.ndarray:
    """Signed distance to the lungs: the cavity without mediastinum, spine, sternum and the dome of the liver."""
    a, b = _cavity(anatomy)
    parts = [
        grid.ellipse(0, -0.05 * b, 0.13 * a, 0.85 * b),  # mediastinum from front to spine
        grid.ellipse(*_heart(anatomy)),
        grid.ellipse(0, _spine_y(anatomy) + 0.10, 0.16, 0.22),
        grid.ellipse(0, 1.06 * b, 0.20, 0.34 * b),  # back muscles beside the spine
        grid.ellipse(0, -1.02 * b, 0.24 * a, 0.16 * b),
    ]
    if anatomy.level > 0.74:
        dome = 0.9 * (anatomy.level - 0.70)
        parts.append(grid.ellipse(-0.52 * a, 0.0, 0.16 + dome, 0.14 + dome))
    inside = grid.ellipse(0, 0, a, b, power=2.35)
    sharpness = 40.0  # rounded corners where organs meet, about a pixel wide
    distances = np.stack([inside, *(-part for part in parts)])
    return np.log(np.exp(np.clip(sharpness * distances, -60, 60)).sum(axis=0)) / sharpness


def draw_nodules(anatomy: Anatomy, grade: int) -> list[Nodule]:
    """Place the nodules of a grade inside the lungs, apart from each other."""
    random = numpy_generator(*anatomy.key, "nodules", grade)
    grid = Grid(64, anatomy.warp)
    lung = _lung_distance(anatomy, grid)
    nodules: list[Nodule] = []
    for number in range(int(random.integers(*_NODULE_COUNT[grade], endpoint=True))):
        radius = random.uniform(*_NODULE_RADIUS[grade])
        row, column = _free_place(lung, grid, nodules, radius, random)
        density, spiculation = random.uniform(-20, 80), random.uniform(*_SPICULATION[grade])
        nodules.append(Nodule(float(grid.x[row, column]), float(grid.y[row, column]), radius, density, spiculation, number))
    return nodules


def _free_place(
    lung: np.ndarray, grid: Grid, nodules: list[Nodule], radius: float, random: np.random.Generator
) -> tuple[int, int]:
    """A pixel well inside the lung and apart from the other nodules; in a full lung the demands shrink, the count stays."""
    gap = np.full(lung.shape, np.inf)
    for other in nodules:
        gap = np.minimum(gap, np.hypot(grid.x - other.x, grid.y - other.y) / (radius + other.radius))
    for depth, apart in ((0.85, 1.1), (0.7, 0.9), (0.5, 0.6)):
        rows, columns = np.nonzero((lung < -depth * radius) & (gap > apart))
        if len(rows):
            pick = int(random.integers(len(rows)))
            return int(rows[pick]), int(columns[pick])
    deepest = int(np.argmin(lung))
    return deepest // lung.shape[1], deepest % lung.shape[1]


def cut_nodules(nodules: list[Nodule], step: int) -> list[Nodule]:
    """The nodules on a slice `step` away: a sphere's cross-section is smaller off its middle."""
    return [replace(nodule, radius=nodule.radius * float(np.sqrt(1 - (0.22 * step) ** 2))) for nodule in nodules]


def draw_slice(anatomy: Anatomy, nodules: list[Nodule], grid: Grid, step: int) -> np.ndarray:
    """One slice in Hounsfield units, (size, size) float32; `step` turns the vessels a little and renews the noise."""
    image = np.full((grid.size, grid.size), AIR, dtype=np.float32)
    _draw_body(image, anatomy, grid)
    lung = _lung_distance(anatomy, grid)
    _draw_mediastinum(image, anatomy, grid)
    _draw_lungs(image, anatomy, grid, lung, step)
    _draw_airways(image, anatomy, grid)
    _draw_bones(image, anatomy, grid)
    for nodule in nodules:
        _draw_nodule(image, anatomy, nodule, grid, lung)
    image = gaussian_filter(image, 0.55 * grid.size / 128)
    image += anatomy.noise * _smooth_noise((*anatomy.key, "noise", step), grid, 0.6 * grid.pixel)
    return np.maximum(image, LOWEST_HU).astype(np.float32)


def _draw_body(image: np.ndarray, anatomy: Anatomy, grid: Grid) -> None:
    """Table, skin, fat, and the muscle of the chest wall with fat between its layers."""
    width, height, fat = anatomy.half_width, anatomy.half_height, anatomy.fat
    if anatomy.table:
        top = height + 0.05 - 0.10 * grid.plain_x**2
        for depth, value in ((0.0, -250.0), (0.10, -350.0)):
            _blend(image, grid.cover(np.maximum(np.abs(grid.plain_y - top - depth) - 0.008, np.abs(grid.plain_x) - 0.8)), value)
    _blend(image, grid.cover(grid.ellipse(0, 0, width, height, power=2.25)), 20.0)
    _blend(image, grid.cover(grid.ellipse(0, 0, width - 0.014, height - 0.014, power=2.25)), FAT)
    muscle = np.minimum(
        grid.ellipse(0, 0, width - fat, height - fat, power=2.3),
        np.minimum(*(grid.ellipse(side * 0.16, height - fat - 0.07, 0.15, 0.09) for side in (-1, 1))),
    )
    layers = np.clip(_smooth_noise((*anatomy.key, "layers"), grid, 0.035) - 0.55, 0, 1) * 150
    _blend(image, grid.cover(muscle), MUSCLE - layers)


def _draw_mediastinum(image: np.ndarray, anatomy: Anatomy, grid: Grid) -> None:
    a, b = _cavity(anatomy)
    x, y, rx, ry, angle = _heart(anatomy)
    spine = _spine_y(anatomy)
    mixed = MUSCLE - 140 * anatomy.mediastinal_fat
    _blend(image, grid.cover(grid.ellipse(0, 0, a, b, power=2.35)), mixed)
    if anatomy.level > 0.74:
        _blend(
            image,
            grid.cover(grid.ellipse(-0.52 * a, 0.0, 0.05 + 0.9 * (anatomy.level - 0.62), 0.9 * (anatomy.level - 0.58))),
            60.0,
        )
    organs = [(x, y, rx - 0.03, ry - 0.03, angle, anatomy.blood)] if anatomy.level > 0.45 else []
    organs += [
        (0.02, -0.40 * b, 0.075, 0.075, 0.0, anatomy.blood),  # ascending aorta
        (-0.10, -0.34 * b, 0.045, 0.05, 0.2, anatomy.blood),  # superior vena cava
        (0.11, spine - 0.06, 0.065, 0.065, 0.0, anatomy.blood),  # descending aorta
        (0.03, spine - 0.15, 0.03, 0.022, 0.3, 25.0),  # oesophagus
    ]
    if 0.35 < anatomy.level < 0.62:
        organs += [(0.09, -0.24 * b, 0.11, 0.055, 0.5, anatomy.blood), (-0.05, -0.10 * b, 0.12, 0.04, -0.15, anatomy.blood)]
    if anatomy.level <= 0.35:
        organs.append((0.07, -0.08 * b, 0.06, 0.20, -0.25, anatomy.blood))  # aortic arch
    for cx, cy, radius_x, radius_y, turn, value in organs:
        _blend(image, grid.cover(grid.ellipse(cx, cy, radius_x, radius_y, turn)), value)


def _draw_airways(image: np.ndarray, anatomy: Anatomy, grid: Grid) -> None:
    """The trachea above the carina, two main bronchi below it, none at the level of the heart."""
    y, low = _spine_y(anatomy) - 0.22, anatomy.level - 0.45
    tubes = [(0.0, 0.055)] if low < 0 else [(side * (0.07 + 0.40 * low), 0.042 - 0.06 * low) for side in (-1, 1)]
    for x, radius in tubes if low < 0.08 else []:
        _blend(image, grid.cover(grid.ellipse(x, y, radius + 0.012, 1.05 * radius + 0.012)), 20.0)
        _blend(image, grid.cover(grid.ellipse(x, y, radius, 1.05 * radius)), TRACHEA)


def _draw_lungs(image: np.ndarray, anatomy: Anatomy, grid: Grid, lung: np.ndarray, step: int) -> None:
    """Air with a gradient to the back, fine texture, and vessels that branch from both hila."""
    texture = anatomy.lung + 45 * grid.y + 14 * _smooth_noise((*anatomy.key, "texture"), grid, 0.05)
    vessels = np.zeros_like(image)
    for side in (-1, 1):
        for window, cover in _vessels(anatomy, grid, side, step):
            np.maximum(vessels[window], cover, out=vessels[window])
    tissue = texture + vessels * (anatomy.blood - 120 - texture)
    _blend(image, grid.cover(lung, soft=1.4), tissue)


def _vessels(anatomy: Anatomy, grid: Grid, side: int, step: int) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """Strokes of one lung's vessel tree and of the vessels that cross the slice."""
    random = numpy_generator(*anatomy.key, "vessels", side)
    a, b = _cavity(anatomy)
    hilum = np.array([side * (0.20 + 0.05 * (side > 0)), 0.02])
    turn = 0.04 * step
    branches = [
        (hilum, angle + turn + random.normal(0, 0.2), random.uniform(0.12, 0.24), random.uniform(0.007, 0.015), 0)
        for angle in np.linspace(-1.3, 1.4, 5)
    ]
    while branches:
        start, angle, length, radius, depth = branches.pop()
        end = start + length * np.array([side * np.cos(angle), np.sin(angle)])
        yield grid.stroke(start, end, radius, 0.8 * radius)
        for fork in (random.uniform(0.2, 0.7), -random.uniform(0.2, 0.7)):
            thinner = radius * random.uniform(0.45, 0.8)
            # a third of the branches leave the slice here
            if random.random() < 0.68 and depth < 3:
                branches.append((end, angle + fork, length * random.uniform(0.5, 0.95), thinner, depth + 1))
    for _ in range(26):
        point = np.array([side * random.uniform(0.15, 1.0) * a, random.uniform(-0.9, 0.9) * b]) + 0.01 * step
        along = random.normal(0, 0.012, 2)
        radius = random.uniform(0.003, 0.009)
        yield grid.stroke(point, point + along, radius, radius)


def _draw_bones(image: np.ndarray, anatomy: Anatomy, grid: Grid) -> None:
    """Cortex around marrow: vertebra with canal and processes, ribs cut obliquely, sternum, shoulder blades."""
    a, b = _cavity(anatomy)
    cortex, marrow, spine = 620 * anatomy.bone, 230 * anatomy.bone, _spine_y(anatomy)
    bones = [
        (0.0, spine, 0.125, 0.100, 0.0),
        *((side * 0.14, spine + 0.16, 0.10, 0.030, side * 0.45) for side in (-1, 1)),  # transverse processes
        *((side * 0.065, spine + 0.13, 0.028, 0.07, side * 0.3) for side in (-1, 1)),  # pedicles
        (0.0, spine + 0.27, 0.026, 0.10, 0.0),  # spinous process
        (0.0, -b - 0.035, 0.11, 0.032, 0.0),  # sternum
    ]
    random = numpy_generator(*anatomy.key, "ribs")
    first = random.uniform(-0.15, 0.15)
    for side in (-1, 1):
        for number in range(6):
            polar = -1.05 + 0.42 * number + first + random.normal(0, 0.05) + 0.25 * anatomy.level
            scale = 0.028 / np.hypot(np.cos(polar) * a, np.sin(polar) * b) + 1
            tangent = np.arctan2(np.cos(polar) * b, -side * np.sin(polar) * a)
            length = random.uniform(0.055, 0.13)
            bones.append((side * np.cos(polar) * a * scale, np.sin(polar) * b * scale, length, 0.022, tangent))
        if anatomy.level < 0.6:
            bones.append((side * 0.66 * anatomy.half_width, 0.62 * anatomy.half_height, 0.17, 0.018, -side * 0.75))
    for x, y, rx, ry, angle in bones:
        _blend(image, grid.cover(grid.ellipse(x, y, rx, ry, angle)), cortex)
        if ry > 0.02:
            _blend(image, grid.cover(grid.ellipse(x, y, rx - 0.013, ry - 0.013, angle)), marrow)
    _blend(image, grid.cover(grid.ellipse(0, spine + 0.15, 0.045, 0.038)), 30.0)  # spinal canal


def _draw_nodule(image: np.ndarray, anatomy: Anatomy, nodule: Nodule, grid: Grid, lung: np.ndarray) -> None:
    """A lobed disc with tapering spicules and a faint halo, all within the lung."""
    random = numpy_generator(*anatomy.key, "outline", nodule.key)
    window = grid.window(nodule.x, nodule.y, 2.6 * nodule.radius)
    inside = grid.cover(lung[window] - 0.3 * nodule.radius, soft=1.4)
    dx, dy = grid.x[window] - nodule.x, grid.y[window] - nodule.y
    angle, spread = np.arctan2(dy, dx), nodule.spiculation
    waves = sum(np.cos(order * angle + random.uniform(0, 6.28)) / order for order in (2, 3, 5))
    edge = nodule.radius * (1 + (0.05 + 0.12 * spread) * waves)
    cover = np.maximum(
        grid.cover(np.hypot(dx, dy) - edge, soft=1.5), 0.25 * spread * grid.cover(np.hypot(dx, dy) - 1.5 * edge, soft=8)
    )
    layer = np.zeros_like(image)
    layer[window] = cover
    centre = np.array([nodule.x, nodule.y])
    for ray in np.arange(round(12 * spread)) * (6.283 / max(round(12 * spread), 1)):
        direction = ray + random.normal(0, 0.15)
        tip = centre + nodule.radius * random.uniform(1.5, 2.3) * np.array([np.cos(direction), np.sin(direction)])
        place, stroke = grid.stroke(centre, tip, 0.28 * nodule.radius, 0.003)
        np.maximum(layer[place], stroke, out=layer[place])
    _blend(image[window], layer[window] * inside, nodule.density)

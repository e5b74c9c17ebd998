"""Shapes: small painted scenes with captions, made by code. `scenes.py` says what is in them; here they are painted."""

import colorsys
import dataclasses
import functools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from jaxcap.data import scenes
from jaxcap.data.records import CaptionBuilder, Record

SEED = 0
SPLITS = {"train": 16000, "val": 500, "test": 500, "novel": 500}  # pictures

_FINER = 4  # objects are drawn this many times larger, then reduced: soft edges
_RGB = {
    "red": (222, 44, 44), "orange": (246, 124, 16), "yellow": (252, 216, 36), "green": (52, 168, 72),
    "blue": (42, 98, 222), "purple": (132, 60, 188), "pink": (250, 128, 178), "black": (38, 38, 44),
}  # fmt: skip


class Shapes(CaptionBuilder, skip_registration=True):
    """The data set: splits train, val, test, and `novel`, which has only pairs of colour and shape that no other split has.

    A record's `objects` is a JSON list of `scenes.Thing`s as dicts, in reading order.
    """

    EXTRA = ("objects",)

    def contents(self) -> dict[str, Sequence[Record]]:
        return {split: _Drawn(split, count, self.size) for split, count in SPLITS.items()}


@dataclass(frozen=True)
class _Drawn(Sequence):
    """The records of a split, each drawn when it is asked for."""

    split: str
    length: int
    size: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        scene = scenes.scene(SEED, self.split, index)
        objects = json.dumps([dataclasses.asdict(thing) for thing in scene.things])
        return Record(f"{self.split}-{index:05d}", paint(scene, self.size), scenes.captions(scene), {"objects": objects})


def paint(scene: scenes.Scene, size: int) -> np.ndarray:
    """The picture of a scene, uint8 [size, size, 3]."""
    rng = random.Random(scene.paint)
    picture = Image.fromarray(_background(scene.background, size, rng))
    layers = [_mask(thing, size) for thing in scene.things]
    shadows = Image.new("L", (size, size))
    drop = max(1, round(size * 0.025))
    for mask, (left, top) in layers:
        shadows.paste(90, (left + drop // 2, top + drop), mask)
    picture.paste((60, 50, 80), (0, 0), shadows.filter(ImageFilter.GaussianBlur(size * 0.02)))
    for thing, (mask, corner) in zip(scene.things, layers, strict=True):
        picture.paste(_patch(thing.colour, mask.width, rng), corner, mask)
    return np.asarray(picture)


def _background(kind: str, size: int, rng: random.Random) -> np.ndarray:
    """A pale gradient between two neighbouring tints with a faint pattern, uint8 [size, size, 3]."""
    hue = rng.random()
    start, end = (
        255 * np.float32(colorsys.hsv_to_rgb((hue + shift) % 1, rng.uniform(0.06, 0.22), rng.uniform(0.92, 1)))
        for shift in (0, rng.uniform(-0.15, 0.15))
    )
    angle, waves, phase = rng.uniform(0, 2 * math.pi), 2 * math.pi * rng.uniform(6.5, 8.5), 2 * math.pi * rng.random()
    x = np.linspace(-0.5, 0.5, size, dtype=np.float32)[None]
    y = x.T
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if kind == "striped":
        wave = np.sin(along * waves + phase)
    elif kind == "checked":
        wave = 3 * np.sin((x * waves + phase) / 2) * np.sin((y * waves + phase) / 2)
    elif kind == "dotted":
        wave = 2 * (np.cos(along * waves + phase) + np.cos(across * waves + phase)) - 1.8
    elif kind == "cloudy":
        noise = Image.frombytes("L", (5, 5), rng.randbytes(25)).resize((size, size), Image.Resampling.BICUBIC)
        wave = np.asarray(noise) / np.float32(300) - 0.42
    else:
        wave = np.full((size, size), -1, np.float32)
    pattern = np.clip(0.5 + 1.2 * wave, 0, 1)[..., None] * np.float32(23)
    return (start + np.clip(0.5 + 0.7 * along, 0, 1)[..., None] * (end - start) - pattern).astype(np.uint8)


def _patch(colour: str, side: int, rng: random.Random) -> Image.Image:
    """A square of a colour, lighter at the top left, its tint a little different for every object."""
    tint = np.float32(_RGB[colour]) + np.float32([rng.uniform(-12, 12) for _ in range(3)])
    return Image.fromarray(np.clip(tint + _light(side), 0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=64)
def _light(side: int) -> np.ndarray:
    ramp = np.linspace(16, -16, side, dtype=np.float32)
    return np.add.outer(ramp, ramp)[..., None]


def _mask(thing: scenes.Thing, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """The coverage of an object by pixel (0..255), and the pixel of its top left corner."""
    reach = thing.radius * 1.25 * size
    left, top = math.floor(thing.x * size - reach), math.floor(thing.y * size - reach)
    side = math.ceil(2 * reach) + 1
    radius = thing.radius * size * _FINER
    x, y = (thing.x * size - left) * _FINER, (thing.y * size - top) * _FINER
    mask = Image.new("L", (side * _FINER, side * _FINER))
    draw = ImageDraw.Draw(mask)
    if thing.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
    elif thing.shape == "moon":
        tilt = math.radians(thing.tilt - 20)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), 255)
        x, y, radius = x + 0.5 * radius * math.cos(tilt), y + 0.5 * radius * math.sin(tilt), 0.82 * radius
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), 0)
    else:
        cos, sin = math.cos(math.radians(thing.tilt)), math.sin(math.radians(thing.tilt))
        draw.polygon([(x + radius * (u * cos - v * sin), y + radius * (u * sin + v * cos))
                      for u, v in _OUTLINES[thing.shape]], 255)
    return mask.reduce(_FINER), (left, top)


def _polar(radii, turn: float = 0.0) -> list[tuple[float, float]]:
    """Corners at equal angles from straight up, at these distances from the centre."""
    angles = [2 * math.pi * i / len(radii) + turn for i in range(len(radii))]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[tuple[float, float]]:
    points = [2 * math.pi * i / 60 for i in range(60)]
    return [(16 * math.sin(t) ** 3 / 16,
             -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 16) for t in points]


_ARM = 0.34
_OUTLINES = {  # corners in radii from the centre
    "square": _polar([1.17] * 4, math.pi / 4),
    "triangle": [(u, v + 0.15) for u, v in _polar([1.15] * 3)],
    "star": _polar([1.12, 0.5] * 5),
    "heart": _heart(),
    "cross": [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
              (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)],
}  # fmt: skip

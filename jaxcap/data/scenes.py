"""Scenes of Shapes in words: what is in a picture, five true captions of it, and whether a caption names it rightly.

A scene is drawn from (seed, split, index) alone, so every split can be made anew anywhere, in any order. `shapes.py` paints it.
"""

import collections
import random
import re
from dataclasses import dataclass

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart", "moon", "cross")
BACKGROUNDS = ("plain", "dotted", "striped", "checked", "cloudy")
REFERENCES = 5  # captions of a picture

# Never together in train, val or test, and the only pairs of `novel`: every colour once, every shape once or twice.
HELD_OUT = frozenset({
    ("red", "star"), ("orange", "heart"), ("yellow", "square"), ("green", "circle"),
    ("blue", "triangle"), ("purple", "cross"), ("pink", "moon"), ("black", "heart"),
})  # fmt: skip
FAMILIAR = frozenset((colour, shape) for colour in COLOURS for shape in SHAPES) - HELD_OUT

# Centres of the objects, in sides of the picture, x to the right and y down; an arrangement lists its objects in reading order.
ARRANGEMENTS = {
    "beside": ((0.27, 0.50), (0.73, 0.50)),
    "stacked": ((0.50, 0.27), (0.50, 0.73)),
    "one above two": ((0.50, 0.28), (0.26, 0.72), (0.74, 0.72)),
    "two above one": ((0.26, 0.28), (0.74, 0.28), (0.50, 0.72)),
}


@dataclass(frozen=True)
class Thing:
    """One object: centre and radius in sides of the picture, tilt in degrees."""

    colour: str
    shape: str
    size: str  # "small" or "large"
    x: float
    y: float
    radius: float
    tilt: float


@dataclass(frozen=True)
class Scene:
    """One picture: its things in reading order, where they stand to each other, and what is behind them."""

    things: tuple[Thing, ...]
    arrangement: str  # a key of ARRANGEMENTS, or for one thing its place, as in "top left" or "middle"
    background: str
    paint: int  # seed of what no caption tells: tints, texture


def scene(seed: int, split: str, index: int) -> Scene:
    """The scene number `index` of a split; those of "novel" have held-out pairs only, all others have none."""
    rng = random.Random(f"{seed}/{split}/{index}")
    pairs = sorted(HELD_OUT if split == "novel" else FAMILIAR)
    count = rng.choices((1, 2, 3), (7, 4, 1))[0]
    if count == 2 and rng.random() < 0.08:
        chosen = [rng.choice(pairs)] * 2  # or "two red stars" would hardly ever be seen
    else:
        chosen = rng.sample(pairs, count)
    if count == 1:
        column, row = rng.choice(("left", "", "right")), rng.choice(("top", "", "bottom"))
        arrangement = " ".join(filter(None, (row, column))) or "middle"
        centres = (({"left": 0.27, "": 0.5, "right": 0.73}[column], {"top": 0.27, "": 0.5, "bottom": 0.73}[row]),)
    else:
        arrangement = rng.choice([name for name, centres in ARRANGEMENTS.items() if len(centres) == count])
        centres = ARRANGEMENTS[arrangement]
    size = rng.choice(("small", "large"))
    things = []
    for (colour, shape), (x, y) in zip(chosen, centres, strict=True):
        if len(set(chosen)) > 1:
            size = rng.choice(("small", "large"))
        radius = rng.uniform(0.125, 0.14) if size == "small" else rng.uniform(0.19, 0.21)
        things.append(Thing(colour, shape, size, x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03),
                            radius, rng.uniform(-12, 12)))
    return Scene(tuple(things), arrangement, rng.choice(BACKGROUNDS), rng.getrandbits(32))


# --- captions ----------------------------------------------------------------------------------------------------

# {0}, {1}, {2} are the objects in reading order, each as "a [small] red star". Captions begin with the first object unless their
# own beginning tells ("there is"): a decoder that sees the picture once learns this far sooner than a free order.
_TEMPLATES = {
    "one": (
        "{0} {place}",
        "there is {0} {place}.",
        "{0} on a {background} background",
        "a picture of {0}",
        "{0} can be seen {place}.",
        "one {thing} {place} of the picture",
        "a {background} picture with {0} {place}",
    ),
    "beside": (
        "{0} to the left of {1}",
        "there is {0} to the left of {1}.",
        "{0} and {1} side by side",
        "{0} on the left and {1} on the right",
        "{0} next to {1}",
        "{0} with {1} to its right",
        "{0} stands next to {1}.",
        "{0} beside {1} on a {background} background",
    ),
    "stacked": (
        "{0} above {1}",
        "there is {0} above {1}.",
        "{0} on top and {1} under it",
        "{0} at the top and {1} at the bottom",
        "{0} with {1} below it",
        "{0} is above {1}.",
        "{0} sits on top of {1}.",
        "{0} over {1} on a {background} background",
    ),
    "one above two": (
        "{0} above {1} and {2}",
        "there is {0} above {1} and {2}.",
        "{0} with {1} and {2} below it",
        "{0} at the top, {1} and {2} at the bottom",
        "{0} sits over {1} and {2}.",
        "{0} over {1} and {2} side by side",
    ),
    "two above one": (
        "{0} and {1} above {2}",
        "there are {0} and {1} above {2}.",
        "{0} and {1} with {2} below them",
        "{0} and {1} at the top, {2} at the bottom",
        "{0} and {1} sit over {2}.",
        "{0} and {1} side by side over {2}",
    ),
    "two beside": (
        "two {things} side by side",
        "a pair of {things} next to each other",
        "there are two {things}, one on the left and one on the right.",
        "two {things} on a {background} background",
        "a picture of two {things} in a row",
    ),
    "two stacked": (
        "two {things}, one above the other",
        "a pair of {things}, one below the other",
        "there are two {things}, one at the top and one at the bottom.",
        "two {things} on a {background} background",
        "a picture of two {things} in a column",
    ),
}  # fmt: skip
_PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}


def captions(of: Scene, seed: int = 0) -> list[str]:
    """Five different true captions of a scene, each with the colour and the shape of everything in it."""
    rng = random.Random(f"{seed}/{of.paint}/captions")
    first = of.things[0]
    if len(of.things) == 1:
        templates = _TEMPLATES["one"]
    elif all((thing.colour, thing.shape) == (first.colour, first.shape) for thing in of.things):
        templates = _TEMPLATES[f"two {of.arrangement}"]
    else:
        templates = _TEMPLATES[of.arrangement]
    return [_fill(template, of, rng) for template in rng.sample(templates, REFERENCES)]


def _fill(template: str, of: Scene, rng: random.Random) -> str:
    sized = rng.random() < 0.5

    def bare(thing: Thing) -> str:
        return f"{thing.size} {thing.colour} {thing.shape}" if sized else f"{thing.colour} {thing.shape}"

    text = template.format(
        *(f"a {bare(thing)}" for thing in of.things),
        thing=bare(of.things[0]),
        things=bare(of.things[0]).replace(of.things[0].shape, _PLURALS[of.things[0].shape]),
        background=of.background,
        place=_place(of.arrangement),
    )
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _place(arrangement: str) -> str:
    if arrangement in ("left", "right"):
        return f"on the {arrangement}"
    if " " in arrangement:
        return f"in the {arrangement} corner"
    return f"{'in' if arrangement == 'middle' else 'at'} the {arrangement}"


# --- attributes --------------------------------------------------------------------------------------------------

_SINGULARS = {plural: shape for shape, plural in _PLURALS.items()}


def attributes(caption: str) -> collections.Counter:
    """The multiset of (colour, shape) that a caption names.

    A shape takes the last colour before it that no other shape took, else "", and "two", or "a pair of", counts a plural twice.
    A colour without a shape is counted as (colour, "").
    """
    found = collections.Counter()
    colour = ""
    for word in re.findall(r"[a-z]+", caption.lower()):
        if word in COLOURS:
            if colour:
                found[colour, ""] += 1
            colour = word
        elif word in SHAPES or word in _SINGULARS:
            found[colour, _SINGULARS.get(word, word)] += 1 if word in SHAPES else 2
            colour = ""
    if colour:
        found[colour, ""] += 1
    return found


def correct(caption: str, objects: list[dict]) -> tuple[bool, bool, bool]:
    """Whether a caption names just the colours, just the shapes, and just the pairs of both that are in a picture.

    `objects` holds a picture's objects as dicts with "colour" and "shape", in any order; numbers count.
    """
    named = list(attributes(caption).elements())
    there = [(thing["colour"], thing["shape"]) for thing in objects]
    colours, shapes = (
        sorted(pair[side] for pair in named if pair[side]) == sorted(pair[side] for pair in there) for side in (0, 1)
    )
    return colours, shapes, sorted(named) == sorted(there)

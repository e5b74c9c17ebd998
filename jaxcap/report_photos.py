"""The report's photos: captioned ones with their references, and what the captioner looked at for every word."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from jaxcap import explain

MOST_SHOWN = 12  # photos of each kind: best, median, worst
MOST_PIXELS = 320  # longest side of a photo in the page
MAP_PIXELS = 144  # side of a map in the page


@dataclass(frozen=True)
class Sample:
    """A captioned photo: `image` uint8 [H, W, 3], the caption's natural log-probability, scores of the photo alone.

    in_train: how many training captions are the same word for word; None where nobody counted.
    """

    image: np.ndarray
    image_id: str
    caption: str
    log_prob: float
    references: Sequence[str]
    scores: Mapping[str, float]
    in_train: int | None = None


def photos(samples: Sequence[Sample]) -> str:
    """Cards of the photos, best to worst by CIDEr."""
    if not samples:
        return ""
    order = sorted(samples, key=_cider, reverse=True)
    count = min(MOST_SHOWN, len(order) // 3)
    between = order[count:len(order) - count]
    skipped = max(len(between) - MOST_SHOWN, 0) // 2
    groups = {"Best photos": order[:count], "Photos in the middle": between[skipped:skipped + MOST_SHOWN],
              "Worst photos": order[len(order) - count:]} if count > 1 else {"Photos": order}
    note = "<small>by CIDEr; log p is the caption’s log-probability</small>"
    return "".join(f'<section{mark}><h2>{name} {note}</h2><div class="cards">{"".join(map(_card, group))}</div></section>'
                   for mark, (name, group) in zip((' id="photos"', "", ""), groups.items()))


def maps(seen: Sequence[tuple[Sample, explain.Explanation]]) -> str:
    """For each photo a strip: the photo as the network saw it, and for every word of the caption what it looked at."""
    if not seen:
        return ""
    even = 1 / seen[0][1].maps_Thw[0].size
    note = ("Bright: the share of its attention that a place gets, on a scale of its own for every word. Looking everywhere "
            f"alike would give each place {even:.1%}. {explain.told([found for _, found in seen])}".rstrip())
    return (f'<section id="maps"><h2>Where it looked</h2><p class="note">{note}</p><div class="strips">'
            f'{"".join(_strip(sample, found) for sample, found in seen)}</div></section>')


def embedded(image: Image.Image, most: int = MOST_PIXELS) -> str:
    """A picture as the address that holds it: JPEG, or PNG where it is so small that JPEG would show."""
    photo = image.copy()
    photo.thumbnail((most, most), Image.Resampling.LANCZOS)
    kind, options = ("png", {}) if max(photo.size) <= 96 else ("jpeg", {"quality": 85})
    buffer = io.BytesIO()
    photo.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _card(sample: Sample) -> str:
    told = [_facts(sample)]
    if sample.in_train is not None:
        told.append(f"{sample.in_train} × in train" if sample.in_train else "new")
    references = "".join(f'<li dir="auto">{escape(text)}</li>' for text in sample.references)
    return (f'<article><img src="{embedded(Image.fromarray(sample.image))}" alt="{_alt(sample)}" loading="lazy">'
            f'<p class="caption" dir="auto">{_caption(sample)}</p><p class="facts">{" · ".join(filter(None, told))}</p>'
            f"<ul>{references}</ul></article>")


def _strip(sample: Sample, found: explain.Explanation) -> str:
    photo, *panels = explain.panels(found)
    cells = [f'<li><img src="{embedded(photo, MAP_PIXELS)}" alt="{_alt(sample)}"></li>']
    for word, map_hw, panel in zip(found.words, found.maps_Thw, panels):
        word = escape(word)
        alt = f"Map of “{word}”, brightest {_place(map_hw)}"
        cells.append(f'<li><img src="{embedded(panel, MAP_PIXELS)}" alt="{alt}" loading="lazy"><span dir="auto">{word}</span> '
                     f"<small>up to {map_hw.max():.0%}</small></li>")
    return (f'<article class="seen"><p class="caption" dir="auto">{_caption(sample)}</p><p class="facts">{_facts(sample)}</p>'
            f'<ol>{"".join(cells)}</ol></article>')


def _place(map_hw: np.ndarray) -> str:
    """Where a map is brightest, in words."""
    y, x = np.unravel_index(map_hw.argmax(), map_hw.shape)
    row, column = (min(int(3 * (at + 0.5) / size), 2) for at, size in zip((y, x), map_hw.shape))
    words = " ".join(filter(None, (("top", "", "bottom")[row], ("left", "", "right")[column])))
    return f"at the {words}" if words else "in the middle"


def _cider(sample: Sample) -> float:
    value = sample.scores.get("cider")
    return value if value is not None and math.isfinite(value) else -math.inf


def _facts(sample: Sample) -> str:
    facts = [("CIDEr {:.2f}", _cider(sample)), ("log p {:.1f}", sample.log_prob)]
    return " · ".join(form.format(value).replace("-", "−") for form, value in facts if math.isfinite(value))


def _caption(sample: Sample) -> str:
    return escape(sample.caption) or "(no word)"


def _alt(sample: Sample) -> str:
    return f"Photo {escape(str(sample.image_id))}, captioned: {_caption(sample)}"

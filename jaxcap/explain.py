"""What a captioner looked at for every word, as a picture: `python -m jaxcap.caption RUN photo --explain`.

A decoder that attends says it itself. For one that is shown the photo once, parts of the photo are covered in turn, and the map
says by how much each word's log-probability falls (occlusion: Zeiler & Fergus 2014, arXiv 1311.2901).
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import regex
from PIL import Image, ImageDraw, ImageFont

from jaxcap import config as configs
from jaxcap import runs
from jaxcap.data.augment import central_crop
from jaxcap.errors import UserError
from jaxcap.vocab import BOS, PAD

GRID, COVERED = 9, 4  # occlusion: positions a side, and the share of a side (1 / COVERED) that a patch covers
SIDE = 224  # pixels of a panel
LENGTHS = 24  # captions are filled up to a multiple of so many words, so that the decoder is compiled once
_VISIBLE = regex.compile(r"[^\p{Default_Ignorable_Code_Point}\p{Cc}\s]")


@dataclass(frozen=True)
class Explanation:
    """image: uint8 [S, S, 3] as the network saw it. words: the caption's. maps_Thw: a map a word, none negative.

    attends: the maps are attention weights, shares that sum to one; otherwise nats lost by covering a place.
    """

    image: np.ndarray
    words: list[str]
    maps_Thw: np.ndarray
    attends: bool

    @property
    def moved(self) -> float:
        """Share of the attention that goes elsewhere from one word to the next, ½ Σ|α_t − α_t−1|, in the mean; 0: it never moves."""
        return float(np.abs(np.diff(self.maps_Thw, axis=0)).sum((1, 2)).mean() / 2) if len(self.maps_Thw) > 1 else 0.0

    @property
    def places(self) -> float:
        """As over how many places looked at alike the attention of a word is spread, the exponential of its entropy, in the mean."""
        if not len(self.maps_Thw):
            return 0.0
        nats_T = -np.sum(self.maps_Thw * np.log(np.maximum(self.maps_Thw, 1e-30)), axis=(1, 2))
        return float(np.exp(nats_T).mean())


def told(seen: Sequence[Explanation]) -> str:
    """How far attention moves and how wide it is, in a sentence; nothing where no map tells."""
    seen = [explanation for explanation in seen if explanation.attends and len(explanation.maps_Thw) > 1]
    if not seen:
        return ""
    moved, places = (float(np.mean([getattr(one, name) for one in seen])) for name in ("moved", "places"))
    return (f"From one word to the next {moved:.0%} of the attention moves; it is spread as over {places:.0f} of "
            f"{seen[0].maps_Thw[0].size} places.")


class Explainer:
    """Makes maps for the photos of one run; its network is compiled once. Raises `UserError` for several runs joined."""

    def __init__(self, run: runs.Run):
        if run.joined:
            raise UserError("--explain looks into one run; leave out --with")
        self._run = run
        look = run.captioner.folded(run.params, run.batch_stats)
        self._encode = functools.partial(jax.jit(lambda look, image_BHWC: look(image_BHWC)), look)
        self._attend = jax.jit(lambda *given: run.captioner.logits_and_attention(*given)[1])

    def explain(self, image_HWC: np.ndarray, caption: str) -> Explanation:
        """The maps of a caption's words for a photo, uint8 at the run's `data.size`."""
        run = self._run
        tokens = run.vocab.encode(caption, max_words=len(caption))[1:-1]
        image_SSC = np.asarray(central_crop(image_HWC[None], configs.encoder_size(run.config))[0])
        maps_Thw = np.zeros((0, 1, 1))
        if tokens:
            maps_Thw = (self._attention if run.captioner.attends else self._occlusion)(image_SSC, tokens)
        shown = np.round(255 * image_SSC).astype(np.uint8)
        return Explanation(shown, [run.vocab.words[token] for token in tokens], maps_Thw, run.captioner.attends)

    def _attention(self, image_SSC: np.ndarray, tokens: list[int]) -> np.ndarray:
        length = -(-len(tokens) // LENGTHS) * LENGTHS  # what follows a word does not change its map
        inputs_BT = jnp.array([[BOS, *tokens[:-1], *[PAD] * (length - len(tokens))]])
        weights_BTP = self._attend(self._run.params, self._encode(image_SSC[None]), inputs_BT)
        side = math.isqrt(weights_BTP.shape[-1])
        return np.asarray(weights_BTP[0, :len(tokens)], np.float32).reshape(-1, side, side)

    def _occlusion(self, image_SSC: np.ndarray, tokens: list[int]) -> np.ndarray:
        size = image_SSC.shape[0]
        patch = max(size // COVERED, 1)
        starts = np.round(np.linspace(0, size - patch, GRID)).astype(int)
        whole_T = self._log_probs(image_SSC[None], tokens)[0]
        rows = []
        for top in starts:  # a row at a time: nine photos through the network
            row_BHWC = np.repeat(image_SSC[None], GRID, axis=0)
            for photo, left in zip(row_BHWC, starts):
                photo[top:top + patch, left:left + patch] = image_SSC.mean((0, 1))
            rows.append(self._log_probs(row_BHWC, tokens))  # [GRID, T]
        return np.maximum(whole_T[:, None, None] - np.stack(rows).transpose(2, 0, 1), 0)

    def _log_probs(self, image_BHWC: np.ndarray, tokens: list[int]) -> np.ndarray:
        """Natural logarithm [B, T] of the probability of each word of one caption, for several photos."""
        inputs_BT = jnp.broadcast_to(jnp.array([BOS, *tokens[:-1]]), (len(image_BHWC), len(tokens)))
        logits_BTV = self._run.captioner.logits(self._run.params, self._encode(image_BHWC), inputs_BT)
        return np.asarray(jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), jnp.array(tokens)[None, :, None], axis=2)[..., 0])


def panels(explanation: Explanation) -> list[Image.Image]:
    """The photo, then for each word its map, upsampled smoothly over the photo, on its own color scale; `SIDE` pixels a side."""
    photo = Image.fromarray(explanation.image).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    gray = np.asarray(photo.convert("L"), np.float32)[..., None]
    drawn = [photo]
    for map_hw in explanation.maps_Thw:
        low, high = float(map_hw.min()), float(map_hw.max())
        smooth = cv2.resize((map_hw - low) / max(high - low, 1e-9), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC).clip(0, 1)
        heat = cv2.applyColorMap(np.uint8(255 * smooth), cv2.COLORMAP_INFERNO)[..., ::-1]
        drawn.append(Image.fromarray(np.uint8(0.4 * gray + 0.6 * heat)))
    return drawn


def word_font(file: str | None = None) -> ImageFont.FreeTypeFont:
    """The font that words are written in: a file (TrueType, OpenType), or Pillow's own, which has English letters only.

    Raises `UserError` if the file is no font.
    """
    size = SIDE // 9 * 0.7
    try:
        return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)
    except (OSError, ValueError) as error:
        raise UserError(f"font {file} cannot be read ({error}); name a TrueType or OpenType file") from error


def lacking(words: Iterable[str], font: ImageFont.FreeTypeFont) -> list[str]:
    """The letters of words that a font draws as it draws what no font has, each once, in the order of the words."""
    font = font.font_variant(layout_engine=ImageFont.Layout.BASIC)  # letter by letter

    def drawn(letter):
        mask = font.getmask(letter)
        return mask.size, bytes(mask)

    nothing = drawn("\U0010FFFF")
    letters = dict.fromkeys(letter for word in words for letter in _VISIBLE.findall(word))
    return [letter for letter in letters if drawn(letter) == nothing]


def picture(explanation: Explanation, columns: int = 5, font: ImageFont.FreeTypeFont | None = None) -> Image.Image:
    """The panels on one sheet, each with its word, in `font` or Pillow's own, and its scale."""
    gap, line = SIDE // 14, SIDE // 9
    font, small = font or word_font(), ImageFont.load_default(line * 0.45)
    drawn = panels(explanation)
    form = "{:.1%} to {:.1%}" if explanation.attends else "{:.2f} to {:.2f} nats"
    texts = [("", ""), *((word, form.format(map_hw.min(), map_hw.max()))
                         for word, map_hw in zip(explanation.words, explanation.maps_Thw))]
    columns = min(columns, len(drawn))
    rows = -(-len(drawn) // columns)
    tall = line + SIDE + line // 2 + gap
    what = ("share of the attention that a place gets" if explanation.attends else
            "how much the word loses when the place is covered")
    note = f"Bright: {what}; every word has its own scale.\n{told([explanation])}" if explanation.words else "The caption has no word."
    width = max(columns * (SIDE + gap), gap + max(math.ceil(small.getlength(one)) for one in note.split("\n")))
    sheet = Image.new("RGB", (gap + width, gap + rows * tall + 3 * line // 2), "white")
    pen = ImageDraw.Draw(sheet)
    for i, ((word, scale), panel) in enumerate(zip(texts, drawn)):
        left, top = gap + i % columns * (SIDE + gap), gap + i // columns * tall
        pen.text((left, top), word, "black", font)
        sheet.paste(panel, (left, top + line))
        pen.text((left, top + line + SIDE + 2), scale, "#62666e", small)
    pen.text((gap, gap + rows * tall), note, "#62666e", small)
    return sheet

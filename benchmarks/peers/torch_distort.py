"""im2txt's distortions of training photos in PyTorch, for a whole batch at once; the numbers of jaxcap.data.augment."""

from typing import NamedTuple

import torch
from torch import Tensor

BRIGHTNESS, HUE = 32 / 255, 0.032  # both ways; saturation and contrast are drawn from 0.5 … 1.5


class Draws(NamedTuple):
    """What chance decides, a number a photo."""

    top_B: Tensor
    left_B: Tensor
    flip_B: Tensor
    brightness_B: Tensor
    saturation_B: Tensor
    hue_B: Tensor
    contrast_B: Tensor
    contrast_last_B: Tensor


def neutral(room: int) -> Tensor:
    """What `draw` must draw to leave the central crop as it is, [8, 1]; the stored photo is larger by `room` pixels."""
    middle = (room // 2 + 0.5) / (room + 1)
    return torch.tensor([middle, middle, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5])[:, None]


def draw(batch: int, room: int, neutral_81: Tensor, chance: Tensor | float) -> Draws:
    """Random draws where `chance` is 1, and what is neutral where it is 0."""
    drawn_8B = neutral_81 + chance * (torch.rand(8, batch, device=neutral_81.device) - neutral_81)
    top, left, flip, brightness, saturation, hue, contrast, last = drawn_8B.unbind()
    return Draws((top * (room + 1)).long().clamp_(max=room), (left * (room + 1)).long().clamp_(max=room), flip < 0.5,
                 (2 * brightness - 1) * BRIGHTNESS, 0.5 + saturation, (2 * hue - 1) * HUE, 0.5 + contrast, last < 0.5)


def crop(table_NHWC: Tensor, index_B: Tensor, draws: Draws, size: int) -> Tensor:
    """float32 [B, C, size, size] in [0, 1]: rows of the table, cropped and flipped as drawn, in one gather."""
    place_S = torch.arange(size, device=index_B.device)
    rows_BS = draws.top_B[:, None] + place_S
    columns_BS = draws.left_B[:, None] + torch.where(draws.flip_B[:, None], size - 1 - place_S, place_S)
    image_BHWC = table_NHWC[index_B[:, None, None], rows_BS[:, :, None], columns_BS[:, None, :]]
    return image_BHWC.permute(0, 3, 1, 2).contiguous().float() / 255


def distort_colour(image_BCHW: Tensor, draws: Draws) -> Tensor:
    """Brightness, saturation, hue, contrast in the order b, s, h, c or b, c, s, h as drawn, clipped to [0, 1]."""
    one_each = [x_B[:, None, None, None] for x_B in draws[3:]]
    brightness, saturation, hue, contrast, last = one_each
    first, second = torch.where(last, 1.0, contrast), torch.where(last, contrast, 1.0)
    image_BCHW = adjust_contrast(image_BCHW + brightness, first)
    image_BCHW = adjust_saturation_hue(image_BCHW, saturation[:, 0], hue[:, 0])
    return adjust_contrast(image_BCHW, second).clamp(0, 1)


def adjust_contrast(image_BCHW: Tensor, factor_B111: Tensor) -> Tensor:
    """Each channel's distance from its mean, times the factor."""
    mean_BC11 = image_BCHW.mean((2, 3), keepdim=True)
    return torch.lerp(mean_BC11, image_BCHW, factor_B111)


def adjust_saturation_hue(image_BCHW: Tensor, saturation_B11: Tensor, hue_B11: Tensor) -> Tensor:
    """HSV saturation times `saturation` (at most 1), hue turned by `hue` of the circle."""
    r, g, b = image_BCHW.unbind(1)
    value, least = image_BCHW.amax(1), image_BCHW.amin(1)
    chroma = value - least
    grey = chroma == 0
    safe = chroma.masked_fill(grey, 1.0)
    sextant = torch.where(value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    sextant = sextant.masked_fill(grey, 0.0) + 6 * hue_B11
    old = torch.where(value > 0, chroma / torch.where(value > 0, value, 1.0), 0.0)
    chroma = (old * saturation_B11).clamp(0, 1) * value
    planes = []
    for start in (5.0, 3.0, 1.0):  # channel n loses chroma · clip(min(k, 4 − k), 0, 1), k = (n + sextant) mod 6
        k = torch.remainder(start + sextant, 6)
        planes.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(planes, dim=1)

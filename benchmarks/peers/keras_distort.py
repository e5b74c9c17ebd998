"""im2txt's distortions of training photos in TensorFlow, for a whole batch at once; the numbers of jaxcap.data.augment."""

from typing import NamedTuple

import tensorflow as tf

BRIGHTNESS, HUE = 32 / 255, 0.032  # both ways; saturation and contrast are drawn from 0.5 … 1.5


class Draws(NamedTuple):
    """What chance decides, a number a photo."""

    top_B: tf.Tensor
    left_B: tf.Tensor
    flip_B: tf.Tensor
    brightness_B: tf.Tensor
    saturation_B: tf.Tensor
    hue_B: tf.Tensor
    contrast_B: tf.Tensor
    contrast_last_B: tf.Tensor


def draw(batch: int, room: int, chance: tf.Tensor) -> Draws:
    """Random draws where `chance` is 1, and what is neutral where it is 0; the stored photo is larger by `room` pixels."""
    middle = (room // 2 + 0.5) / (room + 1)
    neutral_81 = tf.constant([middle, middle, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5])[:, None]
    top, left, flip, brightness, saturation, hue, contrast, last = tf.unstack(
        neutral_81 + chance * (tf.random.uniform((8, batch)) - neutral_81))

    def whole(share: tf.Tensor) -> tf.Tensor:
        return tf.minimum(tf.cast(share * (room + 1), tf.int32), room)

    return Draws(whole(top), whole(left), flip < 0.5, (2 * brightness - 1) * BRIGHTNESS, 0.5 + saturation, (2 * hue - 1) * HUE,
                 0.5 + contrast, last < 0.5)


def crop(table_NHWC: tf.Tensor, index_B: tf.Tensor, draws: Draws, size: int) -> tf.Tensor:
    """float32 [B, size, size, C] in [0, 1]: rows of the table, cropped and flipped as drawn."""
    place_S = tf.range(size)
    rows_BS = draws.top_B[:, None] + place_S
    columns_BS = draws.left_B[:, None] + tf.where(draws.flip_B[:, None], size - 1 - place_S, place_S)
    image_BHWC = tf.gather(tf.gather(table_NHWC, index_B), rows_BS, axis=1, batch_dims=1)
    return tf.cast(tf.gather(image_BHWC, columns_BS, axis=2, batch_dims=1), tf.float32) / 255


def distort_colour(image_BHWC: tf.Tensor, draws: Draws) -> tf.Tensor:
    """Brightness, saturation, hue, contrast in the order b, s, h, c or b, c, s, h as drawn, clipped to [0, 1]."""
    brightness, saturation, hue, contrast, last = (x_B[:, None, None, None] for x_B in draws[3:])
    first, second = tf.where(last, 1.0, contrast), tf.where(last, contrast, 1.0)
    image_BHWC = adjust_contrast(image_BHWC + brightness, first)
    image_BHWC = adjust_saturation_hue(image_BHWC, saturation[..., 0], hue[..., 0])
    return tf.clip_by_value(adjust_contrast(image_BHWC, second), 0, 1)


def adjust_contrast(image_BHWC: tf.Tensor, factor_B111: tf.Tensor) -> tf.Tensor:
    """Each channel's distance from its mean, times the factor."""
    mean_B11C = tf.reduce_mean(image_BHWC, (1, 2), keepdims=True)
    return mean_B11C + factor_B111 * (image_BHWC - mean_B11C)


def adjust_saturation_hue(image_BHWC: tf.Tensor, saturation_B11: tf.Tensor, hue_B11: tf.Tensor) -> tf.Tensor:
    """HSV saturation times `saturation` (at most 1), hue turned by `hue` of the circle."""
    r, g, b = tf.unstack(image_BHWC, axis=-1)
    value, least = tf.reduce_max(image_BHWC, -1), tf.reduce_min(image_BHWC, -1)
    chroma = value - least
    grey = chroma == 0
    safe = tf.where(grey, 1.0, chroma)
    sextant = tf.where(value == r, (g - b) / safe, tf.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    sextant = tf.where(grey, 0.0, sextant) + 6 * hue_B11
    old = tf.where(value > 0, chroma / tf.where(value > 0, value, 1.0), 0.0)
    chroma = tf.clip_by_value(old * saturation_B11, 0, 1) * value
    planes = []
    for start in (5.0, 3.0, 1.0):  # channel n loses chroma · clip(min(k, 4 − k), 0, 1), k = (n + sextant) mod 6
        k = tf.math.floormod(start + sextant, 6)
        planes.append(value - chroma * tf.clip_by_value(tf.minimum(k, 4 - k), 0, 1))
    return tf.stack(planes, axis=-1)

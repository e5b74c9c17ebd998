"""im2txt's distortions of training photos, on the device, inside the step (REFERENCE: image_processing of 2016).

Photos come as uint8 at the stored size and leave as float32 in [0, 1] at the size that the encoder sees.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxcap.config import Augment

# Ranges of im2txt's distort_image.
BRIGHTNESS, SATURATION, HUE, CONTRAST = 32 / 255, (0.5, 1.5), 0.032, (0.5, 1.5)


def central_crop(image_BHWC: Array, size: int) -> Array:
    """uint8 [B, H, W, C] → float32 in [0, 1], the central size × size pixels."""
    top, left = (image_BHWC.shape[1] - size) // 2, (image_BHWC.shape[2] - size) // 2
    return image_BHWC[:, top:top + size, left:left + size].astype(jnp.float32) / 255


def augmentation(augment: Augment, size: int) -> Callable[[Array, Array], Array]:
    """`(key, uint8 [B, H, W, C]) → float32 [B, size, size, C] in [0, 1]`, every photo distorted on its own."""
    if not augment.any():
        return lambda key, image_BHWC: central_crop(image_BHWC, size)

    def one(key: Array, image_HWC: Array) -> Array:
        crop_key, flip_key, color_key = jax.random.split(key, 3)
        if augment.crop:
            corner = [jax.random.randint(k, (), 0, side - size + 1)
                      for k, side in zip(jax.random.split(crop_key), image_HWC.shape)]
            image_HWC = window(image_HWC, *corner, size)
        else:
            image_HWC = central_crop(image_HWC[None], size)[0]
        if image_HWC.dtype == jnp.uint8:
            image_HWC = image_HWC.astype(jnp.float32) / 255
        if augment.flip:
            image_HWC = jnp.where(jax.random.bernoulli(flip_key), image_HWC[:, ::-1], image_HWC)
        return distort_color(color_key, image_HWC) if augment.color else image_HWC

    return lambda key, image_BHWC: jax.vmap(one)(jax.random.split(key, image_BHWC.shape[0]), image_BHWC)


def window(image_HWC: Array, top: Array, left: Array, size: int) -> Array:
    """The size × size pixels below and to the right of (top, left), cut out of rows of values: three channels as an axis of their own
    are slow to cut on TPUs."""
    height, width, channels = image_HWC.shape
    window_HX = jax.lax.dynamic_slice(image_HWC.reshape(height, width * channels), (top, left * channels), (size, size * channels))
    return window_HX.reshape(size, size, channels)


def distort_color(key: Array, image_HWC: Array) -> Array:
    """Brightness, saturation, hue, contrast in the order b, s, h, c or b, c, s, h (evenly drawn), clipped to [0, 1].

    In between channels come first: a CPU computes long rows of one channel many numbers at a time.
    """
    keys = jax.random.split(key, 5)
    image_CHW = jnp.moveaxis(image_HWC, -1, 0) + jax.random.uniform(keys[0], minval=-BRIGHTNESS, maxval=BRIGHTNESS)
    saturation = jax.random.uniform(keys[1], minval=SATURATION[0], maxval=SATURATION[1])
    hue = jax.random.uniform(keys[2], minval=-HUE, maxval=HUE)
    factor = jax.random.uniform(keys[3], minval=CONTRAST[0], maxval=CONTRAST[1])
    contrast_last = jax.random.bernoulli(keys[4])
    # Contrast is applied once; which side of the other two it stands on is a matter of two selects.
    early = jnp.where(contrast_last, image_CHW, adjust_contrast(image_CHW, factor))
    turned = adjust_saturation_hue(early, saturation, hue)
    image_CHW = jnp.where(contrast_last, adjust_contrast(turned, factor), turned)
    return jnp.moveaxis(jnp.clip(image_CHW, 0, 1), 0, -1)


def adjust_contrast(image_CHW: Array, factor: Array) -> Array:
    """Each channel's distance from its mean, times `factor` (tf.image.adjust_contrast)."""
    mean_C = image_CHW.mean(axis=(1, 2), keepdims=True)
    return (image_CHW - mean_C) * factor + mean_C


def adjust_saturation_hue(image_CHW: Array, saturation: Array, hue: Array) -> Array:
    """HSV saturation times `saturation` (at most 1), hue turned by `hue` of the circle (tf.image.adjust_saturation, _hue)."""
    r, g, b = image_CHW
    value = image_CHW.max(axis=0)
    chroma = value - image_CHW.min(axis=0)
    safe = jnp.where(chroma > 0, chroma, 1)
    sextant = jnp.where(value == r, (g - b) / safe, jnp.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    sextant = jnp.where(chroma > 0, sextant, 0) + 6 * hue
    old_saturation = jnp.where(value > 0, chroma / jnp.where(value > 0, value, 1), 0)
    new_chroma = jnp.clip(old_saturation * saturation, 0, 1) * value
    # The closed form of HSV → RGB: channel n loses chroma · clip(min(k, 4 − k), 0, 1), k = (n + sextant) mod 6.
    k = jnp.array([5.0, 3.0, 1.0])[:, None, None] + sextant
    k -= 6 * jnp.floor(k / 6)  # a CPU takes the operator % number by number
    return value - new_chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

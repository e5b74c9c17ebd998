"""im2txt's distortions: exact colour arithmetic, every photo on its own, nothing when off."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcap.config import Augment
from jaxcap.data import augment


@pytest.fixture(scope="module")
def photos_BHWC():
    return jax.random.randint(jax.random.key(0), (6, 12, 12, 3), 0, 256).astype(jnp.uint8)


def test_off_is_the_central_crop(photos_BHWC):
    found = augment.augmentation(Augment(), 8)(jax.random.key(0), photos_BHWC)
    np.testing.assert_allclose(found, np.asarray(photos_BHWC)[:, 2:10, 2:10] / 255.0, rtol=1e-6)


def test_saturation_and_hue_are_those_of_the_hsv_model():
    image_HWC = jax.random.uniform(jax.random.key(1), (9, 9, 3)).at[0, 0].set(0.5).at[0, 1].set(0.0)
    for saturation, hue in ((0.5, 0.03), (1.5, -0.03), (1.0, 0.4)):
        expected = np.zeros(image_HWC.shape)
        for at in np.ndindex(9, 9):
            h, s, v = colorsys.rgb_to_hsv(*map(float, image_HWC[at]))
            expected[at] = colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v)
        found_CHW = augment.adjust_saturation_hue(np.moveaxis(image_HWC, -1, 0), saturation, hue)
        np.testing.assert_allclose(np.moveaxis(found_CHW, 0, -1), expected, atol=1e-5)


def test_contrast_is_about_the_channel_mean(photos_BHWC):
    image_CHW = jnp.moveaxis(photos_BHWC[0], -1, 0) / 255.0
    found = augment.adjust_contrast(image_CHW, 0.5)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), image_CHW.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.std(axis=(1, 2)), 0.5 * image_CHW.std(axis=(1, 2)), rtol=1e-4)


def test_crops_and_flips_are_parts_of_the_photo_and_vary(photos_BHWC):
    same = jnp.repeat(photos_BHWC[:1], 64, axis=0)
    found = np.asarray(augment.augmentation(Augment(crop=True, flip=True), 10)(jax.random.key(0), same)) * 255
    whole = np.asarray(photos_BHWC[0], np.float32)
    windows = [w[:, ::mirror] for y in range(3) for x in range(3) for mirror in (1, -1)
               for w in [whole[y:y + 10, x:x + 10]]]
    matches = [[np.allclose(one, w, atol=1e-3) for w in windows] for one in found]
    assert all(sum(row) == 1 for row in matches)
    assert np.any(matches, axis=0).sum() >= 15  # of the 18 ways


def test_colours_vary_within_the_published_ranges(photos_BHWC):
    grey = jnp.full((200, 4, 4, 3), 128, jnp.uint8)
    found = augment.augmentation(Augment(color=True), 4)(jax.random.key(0), grey)
    shift = np.asarray(found[:, 0, 0, 0]) - 128 / 255  # a grey photo only feels brightness
    assert np.abs(shift).max() <= 32 / 255 + 1e-5 and shift.min() < -0.1 and shift.max() > 0.1
    found = augment.augmentation(Augment(color=True), 12)(jax.random.key(0), photos_BHWC)
    assert found.min() >= 0 and found.max() <= 1 and np.isfinite(found).all()


def test_the_two_orders_of_contrast_both_occur():
    image_HWC = jax.random.uniform(jax.random.key(3), (6, 6, 3))
    keys = [k for k in jax.random.split(jax.random.key(4), 20)]
    last = [bool(jax.random.bernoulli(jax.random.split(k, 5)[4])) for k in keys]
    assert 0 < sum(last) < 20
    for key, contrast_last in zip(keys[:6], last):
        ks = jax.random.split(key, 5)
        x = jnp.moveaxis(image_HWC, -1, 0) + jax.random.uniform(ks[0], minval=-32 / 255, maxval=32 / 255)
        s, h, c = (jax.random.uniform(k, minval=a, maxval=b) for k, (a, b) in zip(ks[1:4], ((0.5, 1.5), (-0.032, 0.032), (0.5, 1.5))))
        if contrast_last:
            x = augment.adjust_contrast(augment.adjust_saturation_hue(x, s, h), c)
        else:
            x = augment.adjust_saturation_hue(augment.adjust_contrast(x, c), s, h)
        np.testing.assert_allclose(augment.distort_color(key, image_HWC), jnp.moveaxis(jnp.clip(x, 0, 1), 0, -1), atol=1e-5)

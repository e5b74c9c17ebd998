"""Inception V3 (Szegedy et al. 2015, arXiv 1512.00567) as TF-slim and Keras publish it: im2txt's encoder.

At 299 × 299 it gives 8 × 8 × 2048 features. Each of its eleven mixed blocks is a tuple of branches that see the same
input and are concatenated, described below as data; the module and the table of published weights both read it.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from jaxcap.encoders import EncoderSpec
from jaxcap.encoders.layers import BatchNormMode, ConvBN, average_pool, max_pool, siblings
from jaxcap.errors import UserError
from jaxcap.weights import Entry

_SMALLEST = 75  # pixels; the last reduction would leave nothing of a smaller image


class Conv(NamedTuple):
    features: int
    height: int = 1
    width: int = 1


class Fork(NamedTuple):
    """Two convolutions of the same input, concatenated."""

    features: int
    kernels: tuple[tuple[int, int], ...] = ((1, 3), (3, 1))


class Mixed(NamedTuple):
    """Branches, each a chain of convolutions, and what is pooled beside them.

    `pool` > 0: an average pooled branch with a 1×1 convolution of that many features. Otherwise the block halves the
    resolution: the last convolution of every branch has stride 2, and the input, max-pooled, is one more branch.
    """

    branches: tuple[tuple[Conv | Fork, ...], ...]
    pool: int = 0


def _at_35(pool: int) -> Mixed:
    return Mixed(((Conv(64),), (Conv(48), Conv(64, 5, 5)), (Conv(64), Conv(96, 3, 3), Conv(96, 3, 3))), pool)


def _at_17(width: int) -> Mixed:
    return Mixed(((Conv(192),),
                  (Conv(width), Conv(width, 1, 7), Conv(192, 7, 1)),
                  (Conv(width), Conv(width, 7, 1), Conv(width, 1, 7), Conv(width, 7, 1), Conv(192, 1, 7))), 192)


_AT_8 = Mixed(((Conv(320),), (Conv(384), Fork(384)), (Conv(448), Conv(384, 3, 3), Fork(384))), 192)

BLOCKS = (  # each function and constant is named after the side of its feature map at 299 × 299
    _at_35(32), _at_35(64), _at_35(64),
    Mixed(((Conv(384, 3, 3),), (Conv(64), Conv(96, 3, 3), Conv(96, 3, 3)))),
    _at_17(128), _at_17(160), _at_17(160), _at_17(192),
    Mixed(((Conv(192), Conv(320, 3, 3)), (Conv(192), Conv(192, 1, 7), Conv(192, 7, 1), Conv(192, 3, 3)))),
    _AT_8, _AT_8,
)


class MixedBlock(nn.Module):
    """x_BHWC → y_BHWC of one `Mixed`. The 1×1 convolutions that start its branches are computed as one."""

    block: Mixed
    batch_norm: BatchNormMode
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BHWC):
        layer = functools.partial(_layer, batch_norm=self.batch_norm, dtype=self.dtype)
        branches, pool = self.block
        starts = {i: layer(x_BHWC.shape[-1], branch[0].features, name=f"branch{i}_0")
                  for i, branch in enumerate(branches) if branch[0] == Conv(branch[0].features)}
        if pool:
            starts["pool"] = layer(x_BHWC.shape[-1], pool, name="pool")
        started = dict(zip(starts, siblings(x_BHWC, list(starts.values()))))
        outputs = []
        for i, branch in enumerate(branches):
            y_BHWC = starts[i].normalize(started[i]) if i in starts else x_BHWC
            for j, conv in enumerate(branch[1:] if i in starts else branch, start=int(i in starts)):
                if isinstance(conv, Fork):
                    outputs += [layer(y_BHWC.shape[-1], conv.features, kernel, name=f"branch{i}_{j}{side}")(y_BHWC)
                                for side, kernel in zip("ab", conv.kernels)]
                    break
                last = not pool and j == len(branch) - 1
                y_BHWC = layer(y_BHWC.shape[-1], conv.features, conv[1:], 2 if last else 1,
                               "VALID" if last else "SAME", name=f"branch{i}_{j}")(y_BHWC)
            else:
                outputs.append(y_BHWC)
        # Averaging after the 1×1 convolution is the same function as before it, on a tenth of the channels.
        outputs.append(starts["pool"].normalize(average_pool(started["pool"])) if pool else max_pool(x_BHWC))
        return jnp.concatenate(outputs, axis=-1)


class InceptionV3(nn.Module):
    """image_BHWC, preprocessed → features_BHWF, F = 2048. Raises `UserError` on an image of less than 75 pixels."""

    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, image_BHWC, batch_norm: BatchNormMode = "inference"):
        if min(image_BHWC.shape[1:3]) < _SMALLEST:
            raise UserError(f"inception_v3 needs photos of at least {_SMALLEST} × {_SMALLEST} pixels; "
                            f"these are {image_BHWC.shape[1]} × {image_BHWC.shape[2]}")
        layer = functools.partial(_layer, padding="VALID", batch_norm=batch_norm, dtype=self.dtype)
        block = nn.remat(MixedBlock) if self.remat else MixedBlock
        x_BHWC = layer(3, 32, (3, 3), 2, name="stem0")(image_BHWC)
        x_BHWC = layer(32, 32, (3, 3), name="stem1")(x_BHWC)
        x_BHWC = layer(32, 64, (3, 3), padding="SAME", name="stem2")(x_BHWC)
        x_BHWC = layer(64, 80, name="stem3")(max_pool(x_BHWC))
        x_BHWC = layer(80, 192, (3, 3), name="stem4")(x_BHWC)
        x_BHWC = max_pool(x_BHWC)
        for i, mixed in enumerate(BLOCKS):
            x_BHWC = block(mixed, batch_norm, self.dtype, name=f"mixed{i}")(x_BHWC)
        return x_BHWC


_layer = functools.partial(ConvBN, gamma=False, decay=0.9997)  # im2txt: no γ, decay of the statistics 0.9997


def preprocess(image_BHWC):
    """[0, 1] → [-1, 1]."""
    return (image_BHWC - 0.5) * 2


def keras_table() -> dict[str, Entry]:
    """Where every weight of a Keras file goes; its layers are numbered branch by branch, the pooled one last."""
    table = {}
    for number, ours in enumerate(_layers(), start=1):
        table[f"conv2d_{number}/kernel"] = Entry(f"params/{ours}/kernel")
        table[f"batch_normalization_{number}/beta"] = Entry(f"params/{ours}/bias")
        table[f"batch_normalization_{number}/moving_mean"] = Entry(f"batch_stats/{ours}/mean")
        table[f"batch_normalization_{number}/moving_variance"] = Entry(f"batch_stats/{ours}/var")
    return table


def _layers() -> list[str]:
    """Our 94 layers in the order of publication."""
    names = [f"stem{i}" for i in range(5)]
    for k, (branches, pool) in enumerate(BLOCKS):
        for i, branch in enumerate(branches):
            for j, conv in enumerate(branch):
                names += [f"mixed{k}/branch{i}_{j}{side}" for side in ("ab" if isinstance(conv, Fork) else ("",))]
        if pool:
            names.append(f"mixed{k}/pool")
    return names


SPEC = EncoderSpec(
    name="inception_v3",
    module=InceptionV3,
    image_size=299,
    features=2048,
    preprocess=preprocess,
    tables={"keras": keras_table},
    source="arXiv 1512.00567; ImageNet weights: Keras's inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5",
    parameters=21_802_784,
    gmacs=5.71,
    top1=77.9,
    top5=93.7,
)

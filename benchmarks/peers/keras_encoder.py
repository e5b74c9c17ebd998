"""Inception V3 of Keras's layers, made from jaxcap's description of the network and its parameters; image [B, H, W, C]."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

EPSILON, DECAY = 1e-3, 0.9997  # of the batch norm: added to the variance, and of the running statistics


class ConvBN:
    """A convolution, its batch norm and a ReLU. name: where their parameters are.

    fold: the batch norm becomes part of the convolution, for a network that is frozen. fused_norm: it is TensorFlow's one operation.
    """

    def __init__(self, arrays: dict[str, np.ndarray], name: str, stride: int = 1, padding: str = "SAME", *, fold: bool,
                 fused_norm: bool):
        kernel, bias = arrays[f"params/encoder/{name}/kernel"], arrays[f"params/encoder/{name}/bias"]
        mean, variance = arrays[f"batch_stats/{name}/mean"], arrays[f"batch_stats/{name}/var"]
        height, width, channels, filters = kernel.shape
        self.conv = layers.Conv2D(filters, (height, width), stride, padding, use_bias=fold, activation="relu" if fold else None)
        self.conv.build((None, None, None, channels))
        self.norm = None
        if fold:
            scale = 1 / np.sqrt(variance + EPSILON)
            self.conv.set_weights([kernel * scale, bias - mean * scale])
        else:
            self.conv.set_weights([kernel])
            self.norm = layers.BatchNormalization(momentum=DECAY, epsilon=EPSILON, scale=False)
            self.norm.build((None, None, None, filters))
            self.norm.set_weights([bias, mean, variance])
        self.fused_norm = fused_norm

    def variables(self) -> list[keras.Variable]:
        return [self.conv.kernel, self.norm.beta]

    def __call__(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        x = self.conv(x)
        if self.norm is None:
            return x
        if not (training and self.fused_norm):
            return tf.nn.relu(self.norm(x, training=training))
        ones = tf.ones_like(self.norm.beta)
        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(x, ones, self.norm.beta.value, epsilon=EPSILON, is_training=True)
        for running, now in ((self.norm.moving_mean, mean), (self.norm.moving_variance, variance)):
            running.assign(DECAY * running + (1 - DECAY) * now)
        return tf.nn.relu(y)


class Encoder:
    """image [B, H, W, C] with values in [0, 1] → features [B, F], the mean over the last map in float32.

    fold, fused_norm: as `ConvBN` has them.
    """

    def __init__(self, network: list[dict], arrays: dict[str, np.ndarray], *, fold: bool, fused_norm: bool):
        self._steps, self._convs = [], []

        def conv(*arguments) -> ConvBN:
            self._convs.append(ConvBN(arrays, *arguments, fold=fold, fused_norm=fused_norm))
            return self._convs[-1]

        stems = blocks = 0
        for step in network:
            if step["type"] == "MaxPool":
                pool = layers.MaxPooling2D(step["size"], 2, step["padding"])
                self._steps.append(lambda x, training, pool=pool: pool(x))
            elif step["type"] == "Conv":
                self._steps.append(conv(f"stem{stems}", step["stride"], step["padding"]))
                stems += 1
            elif step["type"] == "Mixed":
                self._steps.append(_mixed(conv, f"mixed{blocks}", step))
                blocks += 1
            else:
                raise ValueError(f"a step {step} is not written here")

    def variables(self) -> list[keras.Variable]:
        """What trains."""
        return [variable for conv in self._convs for variable in conv.variables()]

    def __call__(self, image_BHWC: tf.Tensor, training: bool) -> tf.Tensor:
        x = tf.cast((image_BHWC - 0.5) * 2, keras.config.dtype_policy().compute_dtype)
        for step in self._steps:
            x = step(x, training)
        return tf.reduce_mean(tf.cast(x, tf.float32), (1, 2))


def _mixed(conv, name: str, block: dict):
    """A block of branches. conv: makes a convolution of its name, stride and padding."""
    chains = []
    for i, branch in enumerate(block["branches"]):
        chain = []
        for j, layer in enumerate(branch):
            if layer["type"] == "Fork":
                chain.append([conv(f"{name}/branch{i}_{j}{side}") for side in "ab"])
            else:
                stride = (block["stride"], block["padding"]) if j == len(branch) - 1 else (1, "SAME")
                chain.append([conv(f"{name}/branch{i}_{j}", *stride)])
        chains.append(chain)
    after_pool = conv(f"{name}/pool") if block["pool"] else None
    pool = (layers.AveragePooling2D(3, 1, "same") if after_pool else
            layers.MaxPooling2D(3, 2, block["padding"]) if block["stride"] > 1 else None)

    def call(x: tf.Tensor, training: bool) -> tf.Tensor:
        outputs = []
        for chain in chains:
            y = x
            for sides in chain:
                y = [side(y, training) for side in sides]
                y = y[0] if len(y) == 1 else tf.concat(y, -1)
            outputs.append(y)
        if after_pool:
            outputs.append(after_pool(pool(x), training))
        elif pool:
            outputs.append(pool(x))
        return tf.concat(outputs, -1)

    return call

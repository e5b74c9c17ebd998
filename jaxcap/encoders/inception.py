"""The language of the Inception networks: a network is a tuple of steps, and a block a tuple of branches, both plain data.

The module below computes any such network, and `layers_of` lists its convolutions for the tables of published weights.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from jaxcap.encoders.layers import BatchNormMode, Biased, ConvBN, Padding, average_pool, convolve, max_pool, require, siblings
from jaxcap.module import Module
from jaxcap.weights import DROPPED, TORCH_KERNEL, Entry


class Conv(NamedTuple):
    features: int
    height: int = 1
    width: int = 1
    stride: int = 1
    padding: Padding = "SAME"


class Separable(NamedTuple):
    """A depthwise convolution that makes `multiplier` channels of each, then a 1×1 convolution; no batch norm between or after."""

    features: int
    size: int
    stride: int
    multiplier: int


class MaxPool(NamedTuple):
    size: int = 3
    padding: Padding = "SAME"


class Fork(NamedTuple):
    """Two convolutions of the same input, concatenated."""

    features: int
    kernels: tuple[tuple[int, int], ...] = ((1, 3), (3, 1))


class Mixed(NamedTuple):
    """Branches, each a chain of convolutions that sees the block's input, and what is pooled beside them, concatenated.

    `pool` > 0: one more branch, 3×3 pooling and a 1×1 convolution of that many features. `stride` 2: the last convolution of
    every branch has it, and the input, max-pooled, is one more branch.
    """

    branches: tuple[tuple[Conv | Fork, ...], ...]
    pool: int = 0
    pooling: Literal["average", "average of whole windows", "max"] = "average"
    stride: int = 1
    padding: Padding = "SAME"  # of what strides


class Residual(NamedTuple):
    """x + scale · (1×1 convolution of the block's branches), and a ReLU."""

    mixed: Mixed
    scale: float
    relu: bool = True


Step = Conv | Separable | MaxPool | Mixed | Residual
_SLOTS = ("RMSProp", "RMSProp_1", "Momentum", "Adam", "Adam_1", "Adagrad", "Adadelta", "Adadelta_1", "Ftrl", "Ftrl_1")  # optimizers'
_DECAY = 0.9997  # of the running statistics, in TF-slim and im2txt


class Inception(nn.Module):
    """image_BHWC, preprocessed → features_BHWF. Raises `UserError` on an image of less than `smallest` pixels."""

    steps: tuple[Step, ...]
    smallest: int = 1
    gamma: bool = False  # TF-slim and Keras train these networks without γ
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, image_BHWC, batch_norm: BatchNormMode = "inference"):
        require(image_BHWC, self.smallest)
        layer = functools.partial(ConvBN, gamma=self.gamma, decay=_DECAY, batch_norm=batch_norm, dtype=self.dtype)
        mixed, residual = (nn.remat(MixedBlock), nn.remat(ResidualBlock)) if self.remat else (MixedBlock, ResidualBlock)
        x_BHWC = image_BHWC
        for name, step in named(self.steps):
            channels = x_BHWC.shape[-1]
            if isinstance(step, MaxPool):
                x_BHWC = max_pool(x_BHWC, step.size, padding=step.padding)
            elif isinstance(step, Conv):
                kernel = (step.height, step.width)
                x_BHWC = layer(channels, step.features, kernel, step.stride, step.padding, name=name)(x_BHWC)
            elif isinstance(step, Separable):
                x_BHWC = SeparableConv(channels, step, self.dtype, name=name)(x_BHWC)
            elif isinstance(step, Mixed):
                x_BHWC = mixed(step, layer, name=name)(x_BHWC)
            else:
                x_BHWC = residual(step, layer, name=name)(x_BHWC)
        return x_BHWC

    def sibling_layers(self) -> dict[tuple[str, ...], list[str]]:
        """By the path of every block its layers that are computed as one."""
        found = {}
        for name, step in named(self.steps):
            if isinstance(step, Mixed):
                found[name,] = list(starts(step))
            elif isinstance(step, Residual):
                found[name, "mixed"] = list(starts(step.mixed))
        return found


def starts(block: Mixed) -> dict[str, int]:
    """The 1×1 convolutions that see a block's input, by name, and their features: what begins its branches, and the pooled one if it may
    come before the pooling."""
    names = {f"branch{i}_0": branch[0].features for i, branch in enumerate(block.branches) if branch[0] == Conv(branch[0].features)}
    return names | ({"pool": block.pool} if block.pool and block.pooling != "max" else {})


class MixedBlock(nn.Module):
    """x_BHWC → y_BHWC of one `Mixed`. The 1×1 convolutions that start its branches are computed as one."""

    block: Mixed
    layer: Callable[..., ConvBN]

    @nn.compact
    def __call__(self, x_BHWC):
        block, channels = self.block, x_BHWC.shape[-1]
        first = {name: self.layer(channels, features, name=name) for name, features in starts(block).items()}
        started = dict(zip(first, siblings(x_BHWC, list(first.values()), self)))
        outputs = []
        for i, branch in enumerate(block.branches):
            name, begun = f"branch{i}_0", f"branch{i}_0" in first
            y_BHWC = first[name].normalize(started[name]) if begun else x_BHWC
            for j, conv in enumerate(branch[1:] if begun else branch, start=int(begun)):
                if isinstance(conv, Fork):
                    outputs += [self.layer(y_BHWC.shape[-1], conv.features, kernel, name=f"branch{i}_{j}{side}")(y_BHWC)
                                for side, kernel in zip("ab", conv.kernels)]
                    break
                strides = (block.stride, block.padding) if j == len(branch) - 1 else ()
                y_BHWC = self.layer(y_BHWC.shape[-1], conv.features, conv[1:3], *strides, name=f"branch{i}_{j}")(y_BHWC)
            else:
                outputs.append(y_BHWC)
        if "pool" in first:  # after the 1×1 convolution it is the same function as before it, on a tenth of the channels
            whole = block.pooling == "average of whole windows"
            outputs.append(first["pool"].normalize(average_pool(started["pool"], whole)))
        elif block.pool:
            outputs.append(self.layer(channels, block.pool, name="pool")(max_pool(x_BHWC, stride=1, padding="SAME")))
        elif block.stride > 1:
            outputs.append(max_pool(x_BHWC, padding=block.padding))
        return jnp.concatenate(outputs, axis=-1)


class ResidualBlock(nn.Module):
    """x_BHWC → y_BHWC of one `Residual`."""

    block: Residual
    layer: Callable[..., ConvBN]

    @nn.compact
    def __call__(self, x_BHWC):
        y_BHWC = MixedBlock(self.block.mixed, self.layer, name="mixed")(x_BHWC)
        up_BHWC = Biased(y_BHWC.shape[-1], x_BHWC.shape[-1], dtype=y_BHWC.dtype, name="up")(y_BHWC)
        x_BHWC = x_BHWC + self.block.scale * up_BHWC
        return nn.relu(x_BHWC) if self.block.relu else x_BHWC


class SeparableConv(Module):
    """x_BHWC → y_BHWC of one `Separable`, bias and ReLU included, as one ordinary convolution: the two have no nonlinearity
    between them, and on three channels a depthwise convolution is slower than the arithmetic that it saves."""

    channels: int
    conv: Separable
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BHWC):
        _, size, stride, multiplier = self.conv
        initial = nn.initializers.he_normal()
        depthwise = self.param("depthwise", initial, (size, size, self.channels, multiplier))
        pointwise = self.param("pointwise", initial, (1, 1, self.channels * multiplier, self.conv.features))
        bias = self.param("bias", nn.initializers.zeros, (self.conv.features,))
        kernel = jnp.einsum("hwcm,cmf->hwcf", depthwise, pointwise.reshape(self.channels, multiplier, -1))
        y_BHWC = convolve(x_BHWC.astype(self.dtype), kernel.astype(self.dtype), stride)
        return nn.relu(y_BHWC + bias.astype(self.dtype))


def preprocess(image_BHWC):
    """[0, 1] → [-1, 1]."""
    return (image_BHWC - 0.5) * 2


def named(steps: tuple[Step, ...]) -> Iterator[tuple[str, Step]]:
    """Every step with the name of its parameters: stem0, stem1, … for convolutions, mixed0, … for blocks, none for pools."""
    numbers = {"stem": 0, "mixed": 0}
    for step in steps:
        if isinstance(step, MaxPool):
            yield "", step
            continue
        kind = "mixed" if isinstance(step, Mixed | Residual) else "stem"
        yield f"{kind}{numbers[kind]}", step
        numbers[kind] += 1


# --- tables of published weights -----------------------------------------------------------------------------------


class Layer(NamedTuple):
    """One convolution: where its parameters are, and where in its block it stands."""

    path: str
    step: str  # "stem0" or "mixed3"
    branch: int = 0
    position: int = 0  # in its branch
    kernel: tuple[int, int] = (1, 1)
    strided: bool = False  # halves the resolution at the end of its branch
    alone: bool = False  # the only one of its branch
    kind: Literal["norm", "biased", "separable"] = "norm"


def layers_of(steps: tuple[Step, ...]) -> list[Layer]:
    """Every convolution in the order of publication: branch by branch, the pooled one and a residual block's last."""
    layers = []
    for name, step in named(steps):
        if isinstance(step, Conv):
            layers.append(Layer(name, name, kernel=(step.height, step.width)))
        elif isinstance(step, Separable):
            layers.append(Layer(name, name, kind="separable"))
        elif isinstance(step, Mixed):
            layers += _branches(name, name, step)
        elif isinstance(step, Residual):
            layers += _branches(f"{name}/mixed", name, step.mixed)
            layers.append(Layer(f"{name}/up", name, kind="biased"))
    return layers


def _branches(path: str, step: str, mixed: Mixed) -> Iterator[Layer]:
    for i, branch in enumerate(mixed.branches):
        for j, conv in enumerate(branch):
            if isinstance(conv, Fork):
                for side, kernel in zip("ab", conv.kernels):
                    yield Layer(f"{path}/branch{i}_{j}{side}", step, i, j, kernel)
            else:
                last = j == len(branch) - 1
                yield Layer(f"{path}/branch{i}_{j}", step, i, j, conv[1:3], last and mixed.stride > 1, len(branch) == 1)
    if mixed.pool:
        yield Layer(f"{path}/pool", step, len(mixed.branches), 1)


def slim_table(network: str, steps: tuple[Step, ...], scopes: dict[str, str], exceptions: dict[str, str],
               classifier: str) -> dict[str, Entry]:
    """Where every tensor of a TF-slim checkpoint goes.

    `scopes` gives the scope of each step, `exceptions` that of single layers where the rule does not hold. Classes are
    counted from the background, which is left out.
    """
    table = {f"{network}/AuxLogits/*": DROPPED, "global_step": DROPPED, "*/ExponentialMovingAverage": DROPPED,
             **{f"*/{slot}": DROPPED for slot in _SLOTS}, "beta?_power": DROPPED,
             f"{network}/Logits/{classifier}/weights": Entry("classifier/kernel", skip=1),
             f"{network}/Logits/{classifier}/biases": Entry("classifier/bias", skip=1)}
    for layer in layers_of(steps):
        scope = f"{network}/{scopes[layer.step]}"
        if layer.step.startswith("mixed") and layer.kind == "norm":
            letter = "abcde"[0 if layer.strided else layer.position]
            size = f"{layer.kernel[0]}x{layer.kernel[1]}"
            name = f"Branch_{layer.branch}/Conv2d_{int(layer.strided)}{letter}_{size}"
            scope = f"{scope}/{exceptions.get(layer.path, name)}"
        if layer.kind == "biased":
            table[f"{scope}/Conv2d_1x1/weights"] = Entry(f"params/{layer.path}/kernel")
            table[f"{scope}/Conv2d_1x1/biases"] = Entry(f"params/{layer.path}/bias")
        elif layer.kind == "separable":
            table[f"{scope}/depthwise_weights"] = Entry(f"params/{layer.path}/depthwise")
            table[f"{scope}/pointwise_weights"] = Entry(f"params/{layer.path}/pointwise")
            table[f"{scope}/biases"] = Entry(f"params/{layer.path}/bias")
        else:
            table[f"{scope}/weights"] = Entry(f"params/{layer.path}/kernel")
            table[f"{scope}/BatchNorm/beta"] = Entry(f"params/{layer.path}/bias")
            table[f"{scope}/BatchNorm/moving_mean"] = Entry(f"batch_stats/{layer.path}/mean")
            table[f"{scope}/BatchNorm/moving_variance"] = Entry(f"batch_stats/{layer.path}/var")
    return table


def keras_table(steps: tuple[Step, ...], named_layers: dict[str, str] | None = None) -> dict[str, Entry]:
    """Where every weight of a Keras file goes; its layers are numbered in our order, save those in `named_layers`."""
    table = {"predictions/kernel": Entry("classifier/kernel"), "predictions/bias": Entry("classifier/bias")}
    named_layers = named_layers or {}
    numbered = [layer.path for layer in layers_of(steps) if layer.path not in named_layers]
    convolutions = {path: (f"conv2d_{n}", f"batch_normalization_{n}") for n, path in enumerate(numbered, start=1)}
    convolutions |= {path: (name, f"{name}_bn") for path, name in named_layers.items()}
    for layer in layers_of(steps):
        convolution, norm = convolutions[layer.path]
        table[f"{convolution}/kernel"] = Entry(f"params/{layer.path}/kernel")
        if layer.kind == "biased":
            table[f"{convolution}/bias"] = Entry(f"params/{layer.path}/bias")
        else:
            table[f"{norm}/beta"] = Entry(f"params/{layer.path}/bias")
            table[f"{norm}/moving_mean"] = Entry(f"batch_stats/{layer.path}/mean")
            table[f"{norm}/moving_variance"] = Entry(f"batch_stats/{layer.path}/var")
    return table


def torchvision_table(names: dict[str, str]) -> dict[str, Entry]:
    """Where every tensor of a torchvision file goes; `names` has its module for each of our layers."""
    table = {"fc.weight": Entry("classifier/kernel", (1, 0)), "fc.bias": Entry("classifier/bias"),
             "*.num_batches_tracked": DROPPED}
    for ours, name in names.items():
        table[f"{name}.conv.weight"] = Entry(f"params/{ours}/kernel", TORCH_KERNEL)
        table[f"{name}.bn.weight"] = Entry(f"params/{ours}/scale")
        table[f"{name}.bn.bias"] = Entry(f"params/{ours}/bias")
        table[f"{name}.bn.running_mean"] = Entry(f"batch_stats/{ours}/mean")
        table[f"{name}.bn.running_var"] = Entry(f"batch_stats/{ours}/var")
    return table

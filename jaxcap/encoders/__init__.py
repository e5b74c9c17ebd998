"""The networks that turn a photo into features, each described by one `EncoderSpec`.

A network's file holds its module, its preprocessing and the tables that map published weights to it, and ends with
`SPEC` or, for a family, `SPECS`. It is imported only when one of its names is asked for.
"""

import difflib
import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxcap.encoders import few, layers
from jaxcap.errors import UserError
from jaxcap.weights import Entry

_FILES = {
    "small_cnn": "small_cnn",
    "inception_v1": "inception_v1",
    "googlenet": "inception_v1",
    "inception_v2": "inception_v2",
    "inception_v3": "inception_v3",
    "inception_v3_torchvision": "inception_v3",
    "inception_resnet_v2": "inception_resnet_v2",
    "densenet121": "densenet",
    **{f"efficientnet_lite{number}": "efficientnet_lite" for number in range(5)},
}


@dataclass(frozen=True, eq=False)  # one object a network: it is hashed as that
class EncoderSpec:
    """One network: how to build it, what it expects, where its published weights are, and its published figures."""

    name: str
    module: Callable[..., nn.Module]  # module(dtype=jnp.float32, remat=False)
    image_size: int  # published side of the square input; any other works
    features: int  # F, channels of the last feature map
    preprocess: Callable[[jax.Array], jax.Array]  # image_BHWC in [0, 1] → the range that the network was trained on
    tables: dict[str, Callable[[], dict[str, Entry]]] = field(default_factory=dict)  # by whose tensor names they map
    epsilon: float = layers.EPSILON  # added to the variance in batch norm
    source: str = ""  # the paper; weights.published has the addresses of the weights
    parameters: int = 0  # moving statistics included, classifier left out
    gmacs: float = 0.0  # multiply-adds of one photo at image_size, in 10⁹, classifier left out
    top1: float | None = None  # published ImageNet accuracy of a central crop, %, by who published the weights
    top5: float | None = None


def names() -> list[str]:
    """The encoders that `get` knows."""
    return list(_FILES)


def get(name: str) -> EncoderSpec:
    """The encoder called `name`. Raises `UserError`, naming the nearest one, if there is none."""
    if name not in _FILES:
        near = difflib.get_close_matches(name, _FILES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_FILES)}"
        raise UserError(f"there is no encoder {name!r}; {hint}")
    module = importlib.import_module(f"jaxcap.encoders.{_FILES[name]}")
    return module.SPECS[name] if hasattr(module, "SPECS") else module.SPEC


def init(module: nn.Module, key: jax.Array, size: int) -> dict:
    """Random variables of an encoder for photos of size × size pixels, distributed as `module.init` has them: filters as He et al.
    draw them (2015, arXiv 1502.01852, section 2.2), normal within two deviations, everything else constant.

    All filters are cut out of one draw. One each is a program that XLA compiles for a minute on NVIDIA cards.
    """
    wanted = shapes(module, size)
    count = sum(leaf.size for leaf in jax.tree.leaves(wanted) if leaf.ndim > 1)
    drawn = nn.initializers.he_normal()(key, (2, -(-count // 2))).ravel()  # two inputs each: a deviation of 1
    taken = 0

    def begin(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        nonlocal taken
        if leaf.ndim == 1:
            return jnp.full(leaf.shape, path[-1].key in ("scale", "var"), leaf.dtype)
        taken += leaf.size
        return math.sqrt(2 / math.prod(leaf.shape[:-1])) * drawn[taken - leaf.size:taken].reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(begin, wanted)


@functools.cache  # to find them takes half a second and more
def shapes(module: nn.Module, size: int) -> dict:
    """Shapes and types of what `init` gives."""
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["variables"], meta_fields=["module", "first", "few"])
@dataclass(frozen=True)
class Folded:
    """An encoder as a pure function image_BHWC → features_BHWF that carries its weights, batch norm folded into the convolutions
    and the kernels side by side that are computed as one.

    It is a pytree: jit may take it as an argument, and one of other weights needs no other program.
    """

    variables: dict
    module: nn.Module
    first: int = 0  # the axis of kernels [height, width, in, out] that is kept first, so that none is turned to be read
    few: bool = False  # see few photos at a time, as CPUs are fast at; gradients should not go through it

    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        layers = functools.partial(self.module.apply, _moved(self.variables, 0, self.first), batch_norm="folded")
        return few.see(self.module, layers, image_BHWC) if self.few else layers(image_BHWC)


def fold(spec: EncoderSpec, variables: dict, dtype=jnp.float32, kernel_dtype=None, remat: bool = False,
         first: int = 0, few: bool = False) -> Folded:
    """The encoder `Folded`.

    kernel_dtype: of the kernels that are factors of products, if another than the arithmetic's (`jaxcap.products`). first, few: as
    of `Folded`.
    """
    params = layers.rounded(layers.fold(variables, spec.epsilon), kernel_dtype)
    if dtype != jnp.float32:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    module = spec.module(dtype=dtype, remat=remat)
    siblings = module.sibling_layers() if hasattr(module, "sibling_layers") else {}
    variables = {"params": params, "joined": layers.joined(params, siblings)}
    return Folded(_moved(variables, first, 0), module, first, few)


def _moved(variables: dict, source: int, destination: int) -> dict:
    """The variables with an axis of the convolutions' kernels elsewhere."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, source, destination) if leaf.ndim == 4 else leaf, variables)

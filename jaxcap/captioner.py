"""The captioner: an encoder and a decoder as pure functions of their parameters.

`params` is `{"encoder": …, "decoder": …}`; `batch_stats` holds the encoder's moving statistics. Both of the encoder's may be packed
(`flat.py`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxcap import config as configs
from jaxcap import encoders, flat, products
from jaxcap.decoders.decoder import Decoder

PyTree = Any


@dataclass(frozen=True)
class Captioner:
    """Encoder and decoder, without parameters. Build one with `build`."""

    spec: encoders.EncoderSpec
    encoder: nn.Module
    decoder: nn.Module
    unit_scaling: bool  # feed pixels in [0, 1] instead of the encoder's published preprocessing
    feature_dropout: float
    doubly_stochastic: float = 0.0  # weight of the penalty on attention
    encoder_kernels: jnp.dtype | None = None  # what the encoder's kernels are rounded to, if another than its arithmetic's
    platform: str = "cpu"  # that it is built for

    def init(self, key: Array, size: int) -> tuple[PyTree, PyTree]:
        """Random `(params, batch_stats)` for photos of size × size pixels."""
        variables = encoders.init(self.encoder, jax.random.split(key)[0], size)
        return {"encoder": variables["params"], "decoder": self.init_decoder(key)}, variables.get("batch_stats", {})

    def init_decoder(self, key: Array) -> PyTree:
        """The decoder's part of `init`."""
        features = jnp.zeros((1, 1, self.spec.features))
        return self.decoder.init(jax.random.split(key)[1], features, jnp.zeros((1, 1), jnp.int32))["params"]

    def shapes(self, size: int) -> tuple[PyTree, PyTree]:
        """Shapes and types of what `init` gives, without a random number drawn."""
        variables = encoders.shapes(self.encoder, size)
        decoder = jax.eval_shape(self.init_decoder, jax.random.key(0))
        return {"encoder": variables["params"], "decoder": decoder}, variables.get("batch_stats", {})

    @functools.partial(jax.jit, static_argnums=0, static_argnames="batch_norm")
    def encode(self, params: PyTree, batch_stats: PyTree, image_BHWC: Array, *,
               batch_norm: str = "inference") -> tuple[Array, PyTree]:
        """Features [B, P, F] of photos with values in [0, 1], and the encoder's statistics after seeing them.

        Where these stay as they are ("inference") batch norm is folded here too: scale and filter get their gradients through
        their product, and what a convolution gives need not be kept, or summed over, before and after it is normalized. It is a
        compiled function also within steps, which trace it once for captions of all lengths.
        """
        if batch_norm == "inference":
            return self.frozen_encode(params, batch_stats, few=False)(image_BHWC), batch_stats
        variables = {"params": encoders.layers.rounded(flat.unpack(params["encoder"]), self.encoder_kernels),
                     "batch_stats": flat.unpack(batch_stats)}
        features_BHWF, updated = self.encoder.apply(
            variables, self._preprocess(image_BHWC), batch_norm=batch_norm, mutable=["batch_stats"])
        updated = updated.get("batch_stats", {})
        return _flatten(features_BHWF), flat.pack(updated) if isinstance(batch_stats, flat.Flat) else updated

    def frozen_encode(self, params: PyTree, batch_stats: PyTree, *, few: bool = True) -> Callable[[Array], Array]:
        """A pure function from photos [B, H, W, C] in [0, 1] to features [B, P, F], batch norm folded into filters.

        It is a pytree that carries the weights. For steps or searches that all look through the same encoder `folded` makes it once,
        and they take it as an argument. On a CPU it sees `few` photos at a time, which is slow where a gradient goes through it.
        """
        variables = {"params": flat.unpack(params["encoder"]), "batch_stats": flat.unpack(batch_stats)}
        first = 3 if self.platform == "gpu" else 2 if self.encoder_kernels else 0  # cuDNN's order, or that of `dense`'s products
        folded = encoders.fold(self.spec, variables, dtype=self.encoder.dtype, kernel_dtype=self.encoder_kernels,
                               remat=self.encoder.remat, first=first, few=few and self.platform == "cpu")
        return jax.tree_util.Partial(self._look, folded)

    @functools.cached_property
    def folded(self) -> Callable[[PyTree, PyTree], Callable[[Array], Array]]:
        """`frozen_encode`, compiled."""
        return jax.jit(self.frozen_encode)

    @property
    def attends(self) -> bool:
        """Whether the decoder looks at positions; if not, the mean of the features is all that it needs."""
        return self.decoder.image == "attention"

    def logits(self, params: PyTree, features_BPF: Array, inputs_BT: Array, *, key: Array | None = None,
               train_features: bool = False, own: Array | None = None) -> Array:
        """Logits [B, T, V] under teacher forcing. With `key`, dropout is on (of the features with `train_features`).

        With `own`, the decoder reads words that it draws itself with that probability: scheduled sampling.
        """
        return self.logits_and_attention(params, features_BPF, inputs_BT, key=key, train_features=train_features, own=own)[0]

    def logits_and_attention(self, params: PyTree, features_BPF: Array, inputs_BT: Array,
                             **options) -> tuple[Array, Array | None]:
        """As `logits`, and the attention weights [B, T, P], None where the decoder does not attend."""
        return self._teach("__call__", params, features_BPF, inputs_BT, **options)

    def outputs_and_attention(self, params: PyTree, features_BPF: Array, inputs_BT: Array,
                              **options) -> tuple[Array, Array | None]:
        """As `logits_and_attention`, but what logits are made of, [T, B, W], for `losses.projected_sum`."""
        return self._teach("outputs", params, features_BPF, inputs_BT, **options)

    def projection(self, params: PyTree) -> tuple[Array, Array]:
        """The matrix [W, V] and the bias [V] that make logits of outputs."""
        return self.decoder.apply({"params": params["decoder"]}, method="projection")

    def _teach(self, method: str, params: PyTree, features_BPF: Array, inputs_BT: Array, *, key: Array | None = None,
               train_features: bool = False, **options) -> tuple[Array, Array | None]:
        variables = {"params": params["decoder"]}
        if key is not None:
            feature_key, dropout_key, sampling_key = jax.random.split(key, 3)
            options |= {"train": True, "rngs": {"dropout": dropout_key, "sampling": sampling_key}}
            if train_features and self.feature_dropout:  # im2txt drops the pooled features: the same channels everywhere
                batch, _, channels = features_BPF.shape
                kept_B1F = jax.random.bernoulli(feature_key, 1 - self.feature_dropout, (batch, 1, channels))
                features_BPF = jnp.where(kept_B1F, features_BPF / (1 - self.feature_dropout), 0)
        found, sown = self.decoder.apply(variables, features_BPF, inputs_BT, method=method, mutable=["attention"], **options)
        return found, sown["attention"]["weights"][0] if self.attends else None

    def words(self, params: PyTree, features_BPF: Array) -> Array:
        """Logits [B, V] of the words of a photo's caption, in no order."""
        return self.decoder.apply({"params": params["decoder"]}, features_BPF, method="words")

    def start(self, params: PyTree, features_BPF: Array) -> tuple[PyTree, PyTree]:
        """`(context, state)` of the decoder before the first word: what stays the same for a photo, and what words change."""
        return self.decoder.apply({"params": params["decoder"]}, features_BPF, method="start")

    def stepper(self, params: PyTree, reads: int = 0) -> Callable[[PyTree, PyTree, Array], tuple[PyTree, Array]]:
        """`step(context, state, token_N)`, which reads a word and gives the decoder's next state and the next word's logits [N, V].

        N may be several captions a photo, those of a photo side by side: `context` has a row a photo and is shared by them.
        With more `reads` to come than there are words, every word is multiplied with the first layer's kernel once.
        """
        variables = {"params": params["decoder"]}
        read_VG = self.decoder.apply(variables, method="read") if reads > self.decoder.vocabulary else None
        return lambda context, state, token_N: self.decoder.apply(variables, context, state, token_N, read_VG, method="step")

    def step_and_attention(self, params: PyTree, context: PyTree, state: PyTree, token_N: Array) -> tuple[PyTree, Array, Array]:
        """A step, and the attention weights [N, P]; only for a decoder that attends."""
        (state, logits_NV), sown = self.decoder.apply(
            {"params": params["decoder"]}, context, state, token_N, method="step", mutable=["attention"])
        return state, logits_NV, sown["attention"]["weights"][0]

    @functools.partial(jax.jit, static_argnums=0)
    def _look(self, folded: Callable[[Array], Array], image_BHWC: Array) -> Array:
        return _flatten(folded(self._preprocess(image_BHWC)))

    def _preprocess(self, image_BHWC: Array) -> Array:
        return image_BHWC if self.unit_scaling else self.spec.preprocess(image_BHWC)


def build(config: configs.Config, vocabulary: int, platform: str | None = None) -> Captioner:
    """The captioner of a config for a vocabulary of that many ids, as it runs on "cpu", "gpu" or "tpu"; None: on what is here."""
    spec = encoders.get(config.encoder.name)
    decoder, platform = config.decoder, platform or jax.default_backend()
    dtype, kernel_dtype = products.dtypes(config.encoder.dtype, platform)
    decoder_dtype, decoder_kernel_dtype = products.dtypes(decoder.dtype, platform)
    return Captioner(
        spec=spec,
        encoder=spec.module(dtype=dtype, remat=config.encoder.remat),
        decoder=Decoder(
            vocabulary=vocabulary, features=spec.features, cell=decoder.name, layers=decoder.layers, image=decoder.image,
            embedding=decoder.embedding, hidden=decoder.hidden, dropout=decoder.dropout, forget_bias=decoder.forget_bias,
            output_tanh=decoder.output_tanh, biases=decoder.biases, tied=decoder.tied, init_scale=decoder.init_scale,
            standardize=decoder.standardize, attention_size=decoder.attention.size, attention_project=decoder.attention.project,
            attention_gate=decoder.attention.gate, attention_dropout=decoder.attention.dropout,
            attention_start=decoder.attention.start, deep_output=decoder.deep_output,
            unroll=decoder.unroll or int(platform == "cpu"),
            dtype=decoder_dtype, kernel_dtype=decoder_kernel_dtype),
        unit_scaling=config.encoder.scaling == "unit",
        feature_dropout=config.encoder.dropout,
        doubly_stochastic=decoder.attention.doubly_stochastic,
        encoder_kernels=kernel_dtype,
        platform=platform,
    )


def _flatten(features_BHWF: Array) -> Array:
    return features_BHWF.reshape(features_BHWF.shape[0], -1, features_BHWF.shape[-1])

"""The training step of `benchmarks.step_time` in Keras on TensorFlow: from rows of a resident table to updated parameters."""

import itertools

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from benchmarks.peers import keras_distort
from benchmarks.peers.keras_encoder import Encoder

PAD = 0


class Decoder:
    """features [B, F], tokens [B, T + 1] → mean cross-entropy in nats a token."""

    def __init__(self, arrays: dict[str, np.ndarray], *, dropout: float, forget_bias: float, unroll: bool):
        params = {name.removeprefix("params/decoder/"): array for name, array in arrays.items()
                  if name.startswith("params/decoder/")}
        (features, embedding), (vocabulary, _) = params["image_embedding"].shape, params["word_embedding"].shape
        hidden = len(params["lstm_bias"]) // 4
        # im2txt's gates i, j, f, o in Keras's order i, f, j, o, and its forget bias, a constant, in the bias.
        kernel, bias = _reordered(params["lstm_kernel"]), _reordered(params["lstm_bias"])
        bias[hidden:2 * hidden] += forget_bias
        self.dropout = dropout
        self.image_embedding = _built(layers.Dense(embedding, use_bias=False), (None, features), params["image_embedding"])
        self.word_embedding = _built(layers.Embedding(vocabulary, embedding), None, params["word_embedding"])
        self.lstm = _built(layers.LSTM(hidden, return_sequences=True, unroll=unroll), (None, None, embedding),
                           kernel[:embedding], kernel[embedding:], bias)
        self.logits = _built(layers.Dense(vocabulary), (None, hidden), params["logits_kernel"], params["logits_bias"])

    def parts(self) -> dict[str, list[keras.Variable]]:
        """What trains, by jaxcap's names."""
        lstm = self.lstm.cell
        return {"image_embedding": [self.image_embedding.kernel], "word_embedding": [self.word_embedding.embeddings],
                "lstm_kernel": [lstm.kernel, lstm.recurrent_kernel], "lstm_bias": [lstm.bias],
                "logits_kernel": [self.logits.kernel], "logits_bias": [self.logits.bias]}

    def __call__(self, features_BF: tf.Tensor, tokens_BT1: tf.Tensor, chance: tf.Tensor | None) -> tf.Tensor:
        image_BE = self.image_embedding(features_BF)
        words_BTE = self.word_embedding(tokens_BT1[:, :-1])
        sequence = dropout(tf.concat([image_BE[:, None], words_BTE], 1), self.dropout, chance)
        hidden_BTD = dropout(self.lstm(sequence)[:, 1:], self.dropout, chance)
        next_BT = tokens_BT1[:, 1:]
        losses_BT = tf.nn.sparse_softmax_cross_entropy_with_logits(next_BT, tf.cast(self.logits(hidden_BTD), tf.float32))
        real_BT = tf.cast(next_BT != PAD, tf.float32)
        return tf.reduce_sum(losses_BT * real_BT) / tf.reduce_sum(real_BT)


class Step:
    """One kind of step in one form, ready to be called again and again.

    kind: of `benchmarks.workload.KINDS`. form: words of `forms.KERAS`. described, arrays, inputs: what jaxcap's side left.
    """

    def __init__(self, kind: str, form: frozenset[str], described: dict, arrays: dict[str, np.ndarray],
                 inputs: dict[str, np.ndarray]):
        self._kind, self._form, self._described, self._optim = kind, form, described, described["optim"][kind]
        keras.config.set_dtype_policy("mixed_bfloat16" if described["dtype"] == "bfloat16" else "float32")
        self._decoder = Decoder(arrays, dropout=described["dropout"], forget_bias=described["forget_bias"], unroll="unroll" in form)
        self._encoder = None
        if kind != "cached":
            self._encoder = Encoder(described["network"], arrays, fold=kind != "joint" and "unfolded" not in form,
                                    fused_norm="fused_norm" in form)
        self._parts = {f"decoder/{name}": variables for name, variables in self._decoder.parts().items()} if kind != "eval" else {}
        if kind == "joint":
            self._parts["encoder"] = self._encoder.variables()
        self._variables = [variable for variables in self._parts.values() for variable in variables]
        self._table = tf.constant(inputs["table"] if kind != "cached" else inputs["table"][:, 0])  # one position
        batches = [(tf.constant(tokens), tf.constant(index)) for tokens, index in zip(inputs["tokens_NBT1"], inputs["index_NB"])]
        self._first, self._batches = batches[0], itertools.cycle(batches)
        self._chance = tf.constant(0.0)  # a tensor, so that the same compiled step is checked without chance and timed with it
        self._agree, self._whole = self._found, self._step
        if form & {"function", "xla"}:
            self._agree, self._whole = (tf.function(call, jit_compile="xla" in form) for call in (self._found, self._step))

    def agree(self) -> dict[str, float]:
        """Loss and gradient norms of the first batch with nothing random; no parameter is updated."""
        loss, norms = self._agree(*self._first, self._chance)
        if self._kind == "eval":
            return {"loss": float(loss)}
        by_variable = dict(zip(map(id, self._variables), map(float, norms)))
        parts = {name: sum(by_variable[id(variable)] ** 2 for variable in variables) ** 0.5
                 for name, variables in self._parts.items()}
        return {"loss": float(loss), "gradient": sum(norm ** 2 for norm in parts.values()) ** 0.5, **parts}

    def start(self) -> None:
        """From here on with chance: dropout and distortions, as in training."""
        self._chance = tf.constant(1.0)

    def __call__(self) -> tf.Tensor:
        """Takes one step and returns the loss, on the device."""
        return self._whole(*next(self._batches), self._chance)

    def _found(self, tokens_BT1: tf.Tensor, index_B: tf.Tensor, chance: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        loss, grads = self._gradients(tokens_BT1, index_B, chance)
        return loss, [tf.norm(_values(grad)) for grad in grads]

    def _step(self, tokens_BT1: tf.Tensor, index_B: tf.Tensor, chance: tf.Tensor) -> tf.Tensor:
        """Clips the global norm and takes a step of plain SGD."""
        loss, grads = self._gradients(tokens_BT1, index_B, chance)
        if not grads:
            return loss
        norm = tf.linalg.global_norm([_values(grad) for grad in grads])
        rate = self._optim["learning_rate"] * tf.minimum(self._optim["clip_norm"] / norm, 1.0)
        for variable, grad in zip(self._variables, grads):
            if isinstance(grad, tf.IndexedSlices):
                variable.value.scatter_sub(tf.IndexedSlices(rate * grad.values, grad.indices))
            else:
                variable.value.assign_sub(rate * grad)
        return loss

    def _gradients(self, tokens_BT1: tf.Tensor, index_B: tf.Tensor, chance: tf.Tensor) -> tuple[tf.Tensor, list]:
        if self._kind == "eval":
            return self._loss(tokens_BT1, index_B, None), []
        with tf.GradientTape() as tape:
            loss = self._loss(tokens_BT1, index_B, chance)
        grads = tape.gradient(loss, [variable.value for variable in self._variables])
        grads = [self._merged(grad) if isinstance(grad, tf.IndexedSlices) else grad for grad in grads]
        if self._kind == "joint" and self._optim["encoder_l2"]:
            filters = {id(variable) for variable in self._parts["encoder"] if len(variable.shape) > 1}
            grads = [grad + self._optim["encoder_l2"] * variable.value if id(variable) in filters else grad
                     for variable, grad in zip(self._variables, grads)]
        return loss, grads

    def _merged(self, grad: tf.IndexedSlices) -> tf.Tensor | tf.IndexedSlices:
        """The gradient with every row once, or dense."""
        if "sparse" not in self._form:
            return tf.convert_to_tensor(grad)
        rows, places = tf.unique(grad.indices)
        return tf.IndexedSlices(tf.math.unsorted_segment_sum(grad.values, places, tf.size(rows)), rows)

    def _loss(self, tokens_BT1: tf.Tensor, index_B: tf.Tensor, chance: tf.Tensor | None) -> tf.Tensor:
        features_BF = self._features(index_B, chance)
        if self._kind == "joint":
            features_BF = dropout(features_BF, self._described["feature_dropout"], chance)
        return self._decoder(features_BF, tokens_BT1, chance)

    def _features(self, index_B: tf.Tensor, chance: tf.Tensor | None) -> tf.Tensor:
        if self._kind == "cached":
            return tf.gather(self._table, index_B)
        size = self._described["size"]
        room = self._table.shape[1] - size
        if self._kind == "eval":
            corner = room // 2
            image_BHWC = tf.cast(tf.gather(self._table, index_B)[:, corner:corner + size, corner:corner + size], tf.float32) / 255
        else:
            draws = keras_distort.draw(index_B.shape[0], room, chance)
            image_BHWC = keras_distort.distort_colour(keras_distort.crop(self._table, index_B, draws, size), draws)
        return self._encoder(image_BHWC, training=self._kind == "joint")


def dropout(x: tf.Tensor, rate: float, chance: tf.Tensor | None) -> tf.Tensor:
    """`x` with a share of `rate` set to zero and the rest made larger. chance: 1, or 0 and nothing is dropped (None: never)."""
    if chance is None or not rate:
        return x
    keep = 1 - rate * chance
    return x * tf.cast(tf.cast(tf.random.uniform(tf.shape(x)) < keep, tf.float32) / keep, x.dtype)


def _built(layer: keras.Layer, shape: tuple | None, *weights: np.ndarray) -> keras.Layer:
    layer.build(shape)
    layer.set_weights(weights)
    return layer


def _reordered(gates: np.ndarray) -> np.ndarray:
    i, j, f, o = np.split(gates, 4, axis=-1)
    return np.concatenate([i, f, j, o], axis=-1)


def _values(grad: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    return grad.values if isinstance(grad, tf.IndexedSlices) else grad

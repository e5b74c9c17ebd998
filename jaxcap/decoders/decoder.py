"""The language model that writes captions: LSTM or GRU, one layer or more, shown the photo first, with every word, or attending to it.

Image first is Show and Tell (Vinyals et al. 2014, arXiv 1411.4555, and 2016, arXiv 1609.06647): the photo is the input of a step
before the first word. With every word the photo is read again (Mao et al. 2014, arXiv 1412.6632; Donahue et al. 2014, arXiv
1411.4389). Attention is Show, Attend and Tell (Xu et al. 2015, arXiv 1502.03044): before every word the first layer looks at the
map. Sizes and initial values are im2txt's; an LSTM's gates stand in its order i, j, f, o, in one matrix over [input, hidden], so
that its checkpoints fit unchanged.
"""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxcap import products, sampling
from jaxcap.decoders import attention, cells, dropout
from jaxcap.decoders.attention import Context
from jaxcap.decoders.dropout import Kept, times
from jaxcap.module import Module

PyTree = Any


class Shown(NamedTuple):
    """What a photo that is read with every word adds, the same for all words: to the first layer's gates [B, G], and to what logits
    are made of [B, E] (None without deep output)."""

    gates_BG: Array
    output_BE: Array | None


class Decoder(Module):
    """The language model.

    Attributes:
      vocabulary: V, ids that can be read and written.
      features: F, channels of the encoder's features.
      cell: "lstm" or "gru"; layers: how many are stacked.
      image: "first": the mean of all positions is the step before the first word; "every": that mean is read with every word, and
        no step comes before; "attention": every word looks at the map.
      embedding: E, width of word and image embeddings.
      hidden: D, units of a layer.
      dropout: share of the input and of every layer's outputs set to zero in training, the image step included.
      forget_bias: added to the LSTM's forget gate.
      output_tanh, biases: False for NIC 2014's LSTM, whose output is not squashed and whose gates have no biases (eq. 4-9).
      tied: words are written with the matrix they are read with (Press & Wolf 2016, arXiv 1608.05859).
      init_scale: all weights start uniform in ±init_scale.
      standardize: subtract from every feature its mean over the training photos and divide by some deviations (`features.statistics`);
        both are constants among the parameters (`feature_mean`, `feature_scale`), set before training.
      attention_size: A, width in which keys and queries are compared.
      attention_project: the map passes a dense layer of this width and a ReLU first (the attention tutorial's encoder); 0: none.
      attention_gate: scale what is seen by β = σ(w·h) (Xu et al. 2015, section 4.2.1).
      attention_dropout: share of the attention weights set to zero in training.
      attention_start: "mean": the first layer starts from tanh of a dense layer of the mean feature (Xu et al.); "zero". Also of a
        photo read with every word.
      deep_output: logits from word, hidden state and what was seen, L_o (E y + L_h h + L_z z) (Xu et al. 2015, eq. 7). Likewise.
      unroll: time steps in each round of a recurrence's loop under teacher forcing, 0 for all (`cells.scan`).
      dtype: of the arithmetic; parameters and logits are float32. kernel_dtype: of kernels, if another (`jaxcap.products`).
    """

    vocabulary: int
    features: int
    cell: Literal["lstm", "gru"] = "lstm"
    layers: int = 1
    image: Literal["first", "every", "attention"] = "first"
    embedding: int = 512
    hidden: int = 512
    dropout: float = 0.3
    forget_bias: float = 1.0
    output_tanh: bool = True
    biases: bool = True
    tied: bool = False
    init_scale: float = 0.08
    standardize: bool = False
    attention_size: int = 512
    attention_project: int = 0
    attention_gate: bool = False
    attention_dropout: float = 0.0
    attention_start: Literal["mean", "zero"] = "mean"
    deep_output: bool = False
    unroll: int = 1
    dtype: jnp.dtype = jnp.float32
    kernel_dtype: jnp.dtype | None = None

    def setup(self):
        def uniform(key, shape):
            return jax.random.uniform(key, shape, jnp.float32, -self.init_scale, self.init_scale)

        zeros = nn.initializers.zeros
        self.unit = cells.get(self.cell, self.forget_bias, self.output_tanh)
        gates = self.unit.gates * self.hidden
        if self.standardize:
            self.feature_mean = self.param("feature_mean", zeros, (self.features,))
            self.feature_scale = self.param("feature_scale", nn.initializers.ones, (self.features,))
        values = self.features
        if self.image == "first":
            self.image_embedding = self.param("image_embedding", uniform, (self.features, self.embedding))
        else:
            if self.image == "attention" and self.attention_project:
                values = self.attention_project
                self.project_kernel = self.param("project_kernel", nn.initializers.he_normal(), (self.features, values))
                self.project_bias = self.param("project_bias", zeros, (values,))
            if self.attention_start == "mean":
                states = len(self.unit.start(jnp.zeros((1, 1))))
                self.start_kernel = self.param("start_kernel", uniform, (values, states * self.hidden))
                self.start_bias = self.param("start_bias", zeros, (states * self.hidden,))
        if self.image == "attention":
            self.key_kernel = self.param("key_kernel", nn.initializers.lecun_normal(), (values, self.attention_size))
            self.key_bias = self.param("key_bias", zeros, (self.attention_size,))
            self.query_kernel = self.param("query_kernel", nn.initializers.lecun_normal(), (self.hidden, self.attention_size))
            self.energy = self.param("energy", uniform, (self.attention_size,))
            if self.attention_gate:
                self.gate_kernel = self.param("gate_kernel", uniform, (self.hidden, 1))
                self.gate_bias = self.param("gate_bias", zeros, (1,))
        self.word_embedding = self.param("word_embedding", uniform, (self.vocabulary, self.embedding))
        first = self.embedding + (values if self.image != "first" else 0)
        kernels, biases, recurrent_biases = [], [], []
        for layer in range(self.layers):
            name = f"{self.cell}{layer or ''}"  # lstm_kernel, lstm1_kernel, …
            kernels.append(self.param(f"{name}_kernel", uniform, ((first if layer == 0 else self.hidden) + self.hidden, gates)))
            biases.append(self.param(f"{name}_bias", zeros, (gates,)) if self.biases else None)
            recurrent_biases.append(self.param(f"{name}_recurrent_bias", zeros, (gates,))
                                    if self.biases and self.cell == "gru" else None)
        self.kernels, self.kernel_biases, self.recurrent_biases = kernels, biases, recurrent_biases
        if self.deep_output:
            self.hidden_output = self.param("hidden_output", uniform, (self.hidden, self.embedding))
            self.seen_output = self.param("seen_output", uniform, (values, self.embedding))
        if not self.tied:
            width = self.embedding if self.deep_output else self.hidden
            self.logits_kernel = self.param("logits_kernel", uniform, (width, self.vocabulary))
        self.logits_bias = self.param("logits_bias", zeros, (self.vocabulary,))

    # --- teacher forcing ---------------------------------------------------------------------------------------------

    def __call__(self, features_BPF: Array, inputs_BT: Array, *, train: bool = False, own: Array | None = None) -> Array:
        """Logits [B, T, V] of the next word at every position, under teacher forcing with `inputs_BT`. Options as of `outputs`."""
        return self._write(self.outputs(features_BPF, inputs_BT, train=train, own=own)).swapaxes(0, 1)

    def outputs(self, features_BPF: Array, inputs_BT: Array, *, train: bool = False, own: Array | None = None,
                words_TBE: Array | None = None) -> Array:
        """What logits are made of, [T, B, W], under teacher forcing: W is the width of `projection`'s matrix.

        There may be several rows of inputs a photo, side by side: their number is a multiple of the features'.
        With `train`, dropout draws from the RNG stream "dropout". With `own`, the decoder reads at every position but the first,
        with that probability, a word drawn from its own prediction in place of the given one: scheduled sampling (Bengio et al.
        2015, arXiv 1506.03099), drawn from "sampling"; no gradient passes through the draw, as there. `words_TBE` are the inputs'
        rows of the word embedding where they were looked up before. Attention weights [B, T, P] are sown as ("attention", "weights").
        """
        features_BPF = self._standardized(features_BPF)
        captions = inputs_BT.shape[0] // features_BPF.shape[0]
        kept = self._draw_kept(features_BPF, inputs_BT, train)
        if own is not None:
            features_BPF = jnp.repeat(features_BPF, captions, axis=0)
            hidden_TBD, words_TBE, seen_TBF = self._sampled(features_BPF, inputs_BT, kept, own)
        else:
            words_TBE = self._embedded(inputs_BT.T) if words_TBE is None else words_TBE.astype(self.dtype)
            hidden_TBD, seen_TBF = self._forced(features_BPF, words_TBE, captions, kept)
        return self._output(times(hidden_TBD, kept.output), words_TBE, seen_TBF)

    def projection(self) -> tuple[Array, Array]:
        """The matrix [W, V] and the bias [V] that make logits of `outputs`."""
        kernel = self.word_embedding.T if self.tied else self.logits_kernel
        return self._factor(kernel), self.logits_bias

    def _forced(self, features_BPF: Array, words_TBE: Array, captions: int, kept: Kept) -> tuple[Array, Array | None]:
        """The last layer's hidden states [T, B, D] and what was seen [T, B, F]: only the recurrences are inside scans."""
        if self.image == "first":
            image_BE = jnp.repeat(self._image(features_BPF), captions, axis=0)
            sequence, seen_TBF = jnp.concatenate([image_BE[None], words_TBE]), None
            sequence = times(sequence, kept.input)
        elif self.image == "every":
            shown, state = jax.tree.map(lambda x: jnp.repeat(x, captions, axis=0), self._show(features_BPF))
            gates_TBG, seen_TBF = jax.tree.map(lambda x: cells.at_every_word(x, len(words_TBE)), shown)  # the latter projected
            x_TBG = self._words_input(times(words_TBE, kept.input)) + gates_TBG
            sequence = cells.scan(self.unit.step, x_TBG, self._recurrent(0), self._recurrent_bias(0), state, self.unroll)
        else:
            context, state = self._look(features_BPF)
            state = jax.tree.map(lambda x: jnp.repeat(x, captions, axis=0), state)
            sequence, seen_TBF = self._attended(context, state, times(words_TBE, kept.input), kept.attention)
        for layer in range(int(self.image != "first"), self.layers):
            if layer:
                sequence = times(sequence, kept.after(layer - 1))
            x_TBG = self._input(sequence, layer)
            first = self._from_zero(x_TBG[0], layer)
            rest_TBD = cells.scan(self.unit.step, x_TBG[1:], self._recurrent(layer), self._recurrent_bias(layer), first, self.unroll)
            sequence = jnp.concatenate([first.hidden_BD[None], rest_TBD])
        return sequence[1:] if self.image == "first" else sequence, seen_TBF  # the image step writes nothing

    def _attended(self, context: Context, state: PyTree, words_TBE: Array, kept_TBP: Array | None) -> tuple[Array, Array]:
        """The first layer's hidden states [T, B, D] and what it saw [T, B, F]."""
        x_TBG = self._words_input(words_TBE)
        hidden_TBD, seen_TBF, weights_TBP = attention.scan(
            self.unit.step, self._attention_weights(), context, state, x_TBG, kept_TBP, self.unroll)
        self.sow("attention", "weights", weights_TBP.swapaxes(0, 1))
        return hidden_TBD, seen_TBF

    def _sampled(self, features_BPF: Array, inputs_BT: Array, kept: Kept, own: Array) -> tuple[Array, Array, Array | None]:
        """Hidden states [T, B, D], the words that were read [T, B, E] and what was seen [T, B, F], a word at a time."""
        context, states = self._begin(features_BPF, kept)
        if self.image == "first":  # the image step has been taken
            kept = jax.tree.map(lambda x: x[1:], kept._replace(output=None))._replace(output=kept.output)

        def body(carry, xs):
            states, logits_BV = carry
            given_B, t, key, kept = xs
            draw_key, coin_key = jax.random.split(key)
            drawn_B = sampling.categorical(draw_key, logits_BV)
            use_B = jax.random.bernoulli(coin_key, own, given_B.shape) & (t > 0)
            words_BE = self._embedded(jnp.where(use_B, drawn_B, given_B))
            states, hidden_BD, seen_BF, weights_BP = self._advance(context, states, words_BE, kept)
            logits_BV = jax.lax.stop_gradient(self._write(self._output(times(hidden_BD, kept.output), words_BE, seen_BF)))
            return (states, logits_BV), (hidden_BD, words_BE, seen_BF, weights_BP)

        batch, steps = inputs_BT.shape
        keys = jax.random.split(self.make_rng("sampling"), steps)
        start = states, cells.zeros_like(jnp.zeros((batch, self.vocabulary)), states[0].hidden_BD)
        _, (hidden_TBD, words_TBE, seen_TBF, weights_TBP) = jax.lax.scan(
            body, start, (inputs_BT.T, jnp.arange(steps), keys, kept))
        if weights_TBP is not None:
            self.sow("attention", "weights", weights_TBP.swapaxes(0, 1))
        return hidden_TBD, words_TBE, seen_TBF

    # --- a word at a time --------------------------------------------------------------------------------------------

    def start(self, features_BPF: Array) -> tuple[PyTree, PyTree]:
        """`(context, state)` before the first word, from which `step` writes it when given BOS.

        The context, what attention looks at, is the same for every word; image first has none. The state is a tuple, a state a
        layer.
        """
        return self._begin(self._standardized(features_BPF), Kept())

    def step(self, context: PyTree, state: PyTree, token_N: Array, read_VG: Array | None = None) -> tuple[PyTree, Array]:
        """Reads one token a row and returns the new state and the next word's logits [N, V].

        N is a multiple of the photos in `context`, the captions of a photo side by side. `read_VG` is what `read` gives. Attention
        weights [N, P] are sown as ("attention", "weights").
        """
        words_NE, x_NG = self._embedded(token_N), None if read_VG is None else read_VG[token_N]
        state, hidden_ND, seen_NF, weights_NP = self._advance(context, state, words_NE, Kept(), x_NG)
        if weights_NP is not None:
            self.sow("attention", "weights", weights_NP)
        return state, self._write(self._output(hidden_ND, words_NE, seen_NF))

    def read(self) -> Array:
        """What every word, read, is to the first layer's gates, [V, G]: where many are read, `step` need not multiply each."""
        return self._words_input(self._embedded(jnp.arange(self.vocabulary)))

    def words(self, features_BPF: Array) -> Array:
        """Logits [B, V] of the words of the caption in no order, from the photo alone: which words are near its embedding.

        A softmax over all words, as Joulin et al. 2016 (arXiv 1511.02251) train encoders on captions. Image first only.
        """
        embedding_VE = self.word_embedding.astype(self.dtype)
        return products.summed(self._image(self._standardized(features_BPF)), embedding_VE.T) + self.logits_bias

    def _begin(self, features_BPF: Array, kept: Kept) -> tuple[PyTree, PyTree]:
        """`start` of standardized features."""
        if self.image != "first":
            context, state = self._look(features_BPF) if self.image == "attention" else self._show(features_BPF)
            zeros = jax.tree.map(lambda x: cells.zeros_like(x, x), state)
            return context, (state, *[zeros] * (self.layers - 1))
        kept = jax.tree.map(lambda x: x[0], kept._replace(output=None))
        states, x = [], times(self._image(features_BPF), kept.input)
        for layer in range(self.layers):
            states.append(self._from_zero(self._input(x, layer), layer))
            x = times(states[-1].hidden_BD, kept.after(layer))
        return (), tuple(states)

    def _advance(self, context: PyTree, states: PyTree, words_NE: Array, kept: Kept, x_NG: Array | None = None):
        """New states, the last layer's hidden state, what was seen and the attention weights (None with image first).

        `x_NG` is the words' part of the first layer's gates, where it is known.
        """
        new, seen_NF, weights_NP = [], None, None
        x_NG = self._words_input(times(words_NE, kept.input)) if x_NG is None else x_NG
        for layer, state in enumerate(states):
            if layer:
                x_NG = self._input(times(x, kept.after(layer - 1)), layer)
            if layer == 0 and self.image == "attention":
                state, seen_NF, weights_NP = attention.step(
                    self.unit.step, self._attention_weights(), context, state, x_NG, kept.attention)
            else:
                if layer == 0 and self.image == "every":
                    shown = jax.tree.map(lambda x_B: jnp.repeat(x_B, len(x_NG) // len(x_B), axis=0), context)
                    x_NG, seen_NF = x_NG + shown.gates_BG, shown.output_BE
                h_NG = cells.from_hidden(state.hidden_BD, self._recurrent(layer), self._recurrent_bias(layer))
                state = self.unit.step(x_NG, h_NG, state)
            new.append(state)
            x = state.hidden_BD
        return tuple(new), x, seen_NF, weights_NP

    # --- parts -------------------------------------------------------------------------------------------------------

    def _standardized(self, features_BPF: Array) -> Array:
        if self.image != "attention":
            features_BPF = features_BPF.astype(jnp.float32).mean(axis=1, keepdims=True)
        if self.standardize:
            mean_F, scale_F = jax.lax.stop_gradient((self.feature_mean, self.feature_scale))
            features_BPF = (features_BPF - mean_F) * scale_F
        return features_BPF.astype(self.dtype)

    def _image(self, features_B1F: Array) -> Array:
        return products.matmul(features_B1F[:, 0], self._factor(self.image_embedding))

    def _embedded(self, tokens: Array) -> Array:
        return self.word_embedding[tokens].astype(self.dtype)

    def _look(self, features_BPF: Array) -> tuple[Context, PyTree]:
        """What the first layer attends to, and its state before the first word."""
        values_BPF = features_BPF
        if self.attention_project:
            values_BPF = products.matmul(values_BPF, self._factor(self.project_kernel))
            values_BPF = nn.relu(values_BPF + self.project_bias.astype(self.dtype))
        keys_BPA = products.matmul(values_BPF, self._factor(self.key_kernel)) + self.key_bias.astype(self.dtype)
        return Context(values_BPF, keys_BPA), self._first_state(values_BPF.mean(axis=1))

    def _show(self, features_B1F: Array) -> tuple[Shown, PyTree]:
        """What the photo adds to every word, and the first layer's state before the first one."""
        mean_BF = features_B1F[:, 0]
        output_BE = products.matmul(mean_BF, self._factor(self.seen_output)) if self.deep_output else None
        gates_BG = products.matmul(mean_BF, self._rows(0, self.embedding, -self.hidden))
        return Shown(gates_BG, output_BE), self._first_state(mean_BF)

    def _first_state(self, mean_BF: Array) -> PyTree:
        zeros_BD = jnp.zeros((mean_BF.shape[0], self.hidden), self.dtype)
        state = self.unit.start(cells.zeros_like(zeros_BD, mean_BF))
        if self.attention_start == "mean":
            start = products.matmul(mean_BF, self._factor(self.start_kernel)) + self.start_bias.astype(self.dtype)
            state = type(state)(*jnp.split(jnp.tanh(start), len(state), axis=-1))
        return state

    def _attention_weights(self) -> attention.Weights:
        gate = (self._factor(self.gate_kernel), self.gate_bias.astype(self.dtype)) if self.attention_gate else ()
        return attention.Weights(self._factor(self.query_kernel), self.energy.astype(self.dtype),
                                 self._rows(0, self.embedding, -self.hidden), self._recurrent(0), self._recurrent_bias(0), *gate)

    def _rows(self, layer: int, start: int | None, stop: int | None) -> Array:
        """Part of a layer's kernel. Without the barrier, in a loop over words, XLA cuts it off anew for every one."""
        return jax.lax.optimization_barrier(self._factor(self.kernels[layer])[start:stop])

    def _factor(self, kernel: Array) -> Array:
        return kernel.astype(self.kernel_dtype or self.dtype)

    def _plus_bias(self, x: Array, layer: int) -> Array:
        return x if self.kernel_biases[layer] is None else x + self.kernel_biases[layer].astype(self.dtype)

    def _words_input(self, words: Array) -> Array:
        """The word's part of the first layer's gates: what is seen may have a part of its own."""
        return self._plus_bias(products.matmul(words, self._rows(0, None, self.embedding)), 0)

    def _input(self, x: Array, layer: int) -> Array:
        """The input's part of a layer's gates."""
        return self._plus_bias(products.matmul(x, self._rows(layer, None, -self.hidden)), layer)

    def _recurrent(self, layer: int) -> Array:
        return self._rows(layer, -self.hidden, None)

    def _recurrent_bias(self, layer: int) -> Array | None:
        bias_G = self.recurrent_biases[layer]
        return None if bias_G is None else bias_G.astype(self.dtype)

    def _from_zero(self, x_BG: Array, layer: int) -> PyTree:
        """The state after the first step, from the zero state: the recurrent product is zero and is left out."""
        zero, bias_G = self.unit.start(jnp.zeros((*x_BG.shape[:-1], self.hidden), x_BG.dtype)), self._recurrent_bias(layer)
        h_BG = jnp.zeros_like(x_BG) if bias_G is None else jnp.broadcast_to(bias_G, x_BG.shape)
        return self.unit.step(x_BG, h_BG, zero)

    def _output(self, hidden: Array, words: Array, seen: Array | None) -> Array:
        if not self.deep_output:
            return hidden
        hidden = products.matmul(hidden, self._factor(self.hidden_output))
        if self.image == "attention":
            seen = products.matmul(seen, self._factor(self.seen_output))
        return words + hidden + seen

    def _write(self, outputs: Array) -> Array:
        kernel, bias = self.projection()
        return (products.summed(outputs, kernel) + bias).astype(jnp.float32)

    def _draw_kept(self, features_BPF: Array, inputs_BT: Array, train: bool) -> Kept:
        """What dropout keeps in this pass, the same for teacher forcing and scheduled sampling."""
        if not train:
            return Kept()
        batch, steps = inputs_BT.shape
        reads = steps + (self.image == "first")  # the image step is dropped from, too

        def draw(rate, *shape):
            return dropout.draw(self.make_rng("dropout"), rate, shape, self.dtype) if rate else None

        return Kept(
            input=draw(self.dropout, reads, batch, self.embedding),
            attention=draw(self.attention_dropout, steps, batch, features_BPF.shape[1]) if self.image == "attention" else None,
            between=tuple(draw(self.dropout, reads, batch, self.hidden) for _ in range(self.layers - 1)),
            output=draw(self.dropout, steps, batch, self.hidden))

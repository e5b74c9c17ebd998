"""Decoders: equations, sizes, causality, attention, scheduled sampling, and a gradient that is written out by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcap import features, sampling, search
from jaxcap.decoders import attention, cells
from jaxcap.decoders.decoder import Decoder

B, T, V, F, E, D = 3, 5, 11, 7, 4, 6


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(vocabulary=V, features=F, embedding=E, hidden=D, dropout=0.0, init_scale=0.5)
    keys = jax.random.split(jax.random.key(0), 3)
    features_BPF = jax.random.normal(keys[0], (B, 2, F))
    tokens_BT = jax.random.randint(keys[1], (B, T), 0, V)
    return decoder, decoder.init(keys[2], features_BPF, tokens_BT), features_BPF, tokens_BT


def test_sizes_are_im2txts():
    decoder = Decoder(vocabulary=12_000, features=2048)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 1, 2048)), jnp.zeros((1, 1), jnp.int32))
    sizes = {name: leaf.size for name, leaf in shapes["params"].items()}
    assert sizes["image_embedding"] == 1_048_576
    assert sizes["word_embedding"] == 6_144_000
    assert sizes["lstm_kernel"] + sizes["lstm_bias"] == 2_099_200
    assert sizes["logits_kernel"] + sizes["logits_bias"] == 6_156_000


def test_initial_weights_are_uniform_and_biases_zero(model):
    params = model[1]["params"]
    assert 0.4 < jnp.abs(params["lstm_kernel"]).max() <= 0.5
    assert not params["lstm_bias"].any() and not params["logits_bias"].any()


def test_equals_the_equations_in_numpy(model):
    decoder, variables, features_BPF, tokens_BT = model
    p = jax.tree.map(np.asarray, variables["params"])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    c, h = np.zeros((B, D)), np.zeros((B, D))
    expected = []
    inputs = [np.asarray(features_BPF).mean(axis=1) @ p["image_embedding"]]
    inputs += [p["word_embedding"][tokens_BT[:, t]] for t in range(T)]
    for x in inputs:
        i, j, f, o = np.split(np.concatenate([x, h], axis=1) @ p["lstm_kernel"] + p["lstm_bias"], 4, axis=1)
        c = sigmoid(f + 1.0) * c + sigmoid(i) * np.tanh(j)
        h = sigmoid(o) * np.tanh(c)
        expected.append(h @ p["logits_kernel"] + p["logits_bias"])
    logits_BTV = decoder.apply(variables, features_BPF, tokens_BT)
    np.testing.assert_allclose(logits_BTV, np.stack(expected[1:], axis=1), rtol=1e-4, atol=1e-5)


def test_single_steps_equal_the_scan(model):
    decoder, variables, features_BPF, tokens_BT = model
    context, state = decoder.apply(variables, features_BPF, method="start")
    steps = []
    for t in range(T):
        state, logits_BV = decoder.apply(variables, context, state, tokens_BT[:, t], method="step")
        steps.append(logits_BV)
    np.testing.assert_allclose(jnp.stack(steps, axis=1), decoder.apply(variables, features_BPF, tokens_BT), atol=1e-5)


def test_a_token_changes_nothing_before_it(model):
    decoder, variables, features_BPF, tokens_BT = model
    before = decoder.apply(variables, features_BPF, tokens_BT)
    after = decoder.apply(variables, features_BPF, tokens_BT.at[:, 3].set((tokens_BT[:, 3] + 1) % V))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).all(axis=2).any()


def test_dropout_acts_in_training_only_and_keeps_the_mean(model):
    _, variables, features_BPF, tokens_BT = model
    decoder = Decoder(vocabulary=V, features=F, embedding=E, hidden=D, dropout=0.5)
    run = lambda seed: decoder.apply(variables, features_BPF, tokens_BT, train=True, rngs={"dropout": jax.random.key(seed)})
    assert (run(0) != run(1)).any()
    np.testing.assert_array_equal(decoder.apply(variables, features_BPF, tokens_BT), model[0].apply(variables, features_BPF, tokens_BT))
    kept = decoder.apply(variables, jnp.ones((400, 1, F)), jnp.ones((400, 9), jnp.int32), True, method="_draw_kept",
                         rngs={"dropout": jax.random.key(0)})
    for factor in (kept.input, kept.output):
        assert set(np.unique(factor)) == {0.0, 2.0} and abs(factor.mean() - 1) < 0.05


def test_bfloat16_is_close_and_logits_are_float32(model):
    decoder, variables, features_BPF, tokens_BT = model
    low = decoder.clone(dtype=jnp.bfloat16).apply(variables, features_BPF, tokens_BT)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, decoder.apply(variables, features_BPF, tokens_BT), atol=0.05)


def test_standardized_features_have_no_mean_and_get_no_gradient(model):
    _, variables, _, tokens_BT = model
    decoder = Decoder(vocabulary=V, features=F, embedding=E, hidden=D, dropout=0.0, standardize=True)
    features_NPF = np.random.default_rng(0).normal(3, np.arange(1, F + 1), (500, 1, F)).astype(np.float32)
    constants = features.statistics(features_NPF, 4.0)
    pooled_NF = (features_NPF.mean(axis=1) - constants["feature_mean"]) * constants["feature_scale"]
    np.testing.assert_allclose(pooled_NF.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(pooled_NF.std(axis=0), 1 / 4, rtol=1e-2)
    params = {**variables["params"], **constants}
    plain = Decoder(vocabulary=V, features=F, embedding=E, hidden=D, dropout=0.0)
    np.testing.assert_allclose(decoder.apply({"params": params}, features_NPF[:B], tokens_BT),
                               plain.apply(variables, pooled_NF[:B, None], tokens_BT), rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda p: decoder.apply({"params": p}, features_NPF[:B], tokens_BT).sum())(params)
    assert not grads["feature_mean"].any() and not grads["feature_scale"].any() and grads["image_embedding"].any()


# --- every decoder ---------------------------------------------------------------------------------------------------

P, A = 4, 5
VARIANTS = {
    "lstm": {}, "gru, two layers": {"cell": "gru", "layers": 2}, "nic 2014": {"biases": False, "output_tanh": False},
    "tied, standardized": {"tied": True, "embedding": D, "standardize": True}, "attention": {"image": "attention"},
    "attention tutorial": {"image": "attention", "cell": "gru", "attention_project": 3, "attention_start": "zero"},
    "show attend tell": {"image": "attention", "attention_gate": True, "deep_output": True, "tied": True},
    "attention, three layers": {"image": "attention", "layers": 3, "standardize": True},
    "every word": {"image": "every", "standardize": True}, "every word, from zero": {"image": "every", "attention_start": "zero"},
    "every word, deep": {"image": "every", "cell": "gru", "layers": 2, "deep_output": True},
}
every = pytest.mark.parametrize("variant", VARIANTS)
kinds = pytest.mark.parametrize("variant", ["lstm", "gru, two layers", "show attend tell", "attention, three layers", "every word, deep"])


def made(variant: str, **options):
    """A decoder, its parameters with no zero among them, a photo's features and words."""
    options = {"vocabulary": V, "features": F, "embedding": E, "hidden": D, "dropout": 0.0, "init_scale": 0.5, "attention_size": A,
               **VARIANTS[variant], **options}
    decoder = Decoder(**options)
    keys = jax.random.split(jax.random.key(3), 4)
    features_BPF = jax.random.normal(keys[0], (B, P, F))
    tokens_BT = jax.random.randint(keys[1], (B, T), 0, V)
    params = decoder.init(keys[2], features_BPF, tokens_BT)["params"]
    leaves, structure = jax.tree.flatten(params)
    noise = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(jax.random.split(keys[3], len(leaves)), leaves)]
    return decoder, jax.tree.unflatten(structure, [leaf + other for leaf, other in zip(leaves, noise)]), features_BPF, tokens_BT


@every
@pytest.mark.parametrize("looked_up", [False, True])
def test_single_steps_equal_teacher_forcing_in_every_variant(variant, looked_up):
    decoder, params, features_BPF, tokens_BT = made(variant)
    variables = {"params": params}
    read_VG = decoder.apply(variables, method="read") if looked_up else None
    if looked_up:  # the first layer's kernel is not needed for the words any more
        name = f"{decoder.cell}_kernel"
        variables = {"params": params | {name: params[name].at[:decoder.embedding].set(jnp.nan)}}
    forced_BTV = jax.jit(decoder.apply)({"params": params}, features_BPF, tokens_BT)
    context, state = decoder.apply({"params": params}, features_BPF, method="start")
    step = jax.jit(lambda state, token_B: decoder.apply(variables, context, state, token_B, read_VG, method="step"))
    for t in range(T):
        state, logits_BV = step(state, tokens_BT[:, t])
        np.testing.assert_allclose(logits_BV, forced_BTV[:, t], rtol=1e-4, atol=1e-5, err_msg=f"word {t}")


@every
def test_several_captions_of_a_photo_share_its_context(variant):
    decoder, params, features_BPF, tokens_BT = made(variant)
    variables, K = {"params": params}, 2
    context, state = decoder.apply(variables, features_BPF, method="start")
    tokens_N = jnp.arange(B * K) % V
    new, logits_NV = decoder.apply(variables, context, jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), state), tokens_N, method="step")
    for k in range(K):
        alone, logits_BV = decoder.apply(variables, context, state, tokens_N[k::K], method="step")
        np.testing.assert_allclose(logits_NV[k::K], logits_BV, rtol=1e-4, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[k::K], b, rtol=1e-4, atol=1e-5), new, alone)


@every
def test_every_parameter_gets_a_gradient_and_no_word_sees_ahead(variant):
    decoder, params, features_BPF, tokens_BT = made(variant)
    run = jax.jit(lambda params, tokens_BT: decoder.apply({"params": params}, features_BPF, tokens_BT))
    before, after = run(params, tokens_BT), run(params, tokens_BT.at[:, 3].set((tokens_BT[:, 3] + 1) % V))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(axis=2).all()
    grads = jax.grad(lambda params: jnp.sum(jnp.sin(run(params, tokens_BT))))(params)
    still = {name for name, leaf in grads.items() if not jnp.abs(leaf).max() > 1e-6}
    # A softmax does not see what is added to all its energies alike, and the constants of standardized features never train.
    assert still == ({"feature_mean", "feature_scale"} if decoder.standardize else set())


@kinds
def test_scheduled_sampling_with_probability_0_is_teacher_forcing(variant):
    decoder, params, features_BPF, tokens_BT = made(variant, dropout=0.4, attention_dropout=0.3 if "attention" in variant else 0.0)

    def loss(params, **options):
        logits_BTV, _ = decoder.apply({"params": params}, features_BPF, tokens_BT, train=True, mutable=["attention"],
                                      rngs={"dropout": jax.random.key(1), "sampling": jax.random.key(2)}, **options)
        return jnp.sum(jnp.sin(logits_BTV)), logits_BTV

    (_, forced), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    (_, sampled), other = jax.jit(jax.value_and_grad(lambda p: loss(p, own=jnp.float32(0)), has_aux=True))(params)
    np.testing.assert_allclose(sampled, forced, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), other, gradient)


@kinds
def test_scheduled_sampling_with_probability_1_reads_its_own_words(variant, monkeypatch):
    monkeypatch.setattr(sampling, "categorical", lambda key, logits: logits.argmax(axis=-1))  # so that they are known
    decoder, params, features_BPF, tokens_BT = made(variant)
    variables = {"params": params}
    sampled_BTV, _ = decoder.apply(variables, features_BPF, tokens_BT, own=jnp.float32(1), mutable=["attention"],
                                   rngs={"sampling": jax.random.key(0)})
    context, state = decoder.apply(variables, features_BPF, method="start")
    step = jax.jit(lambda state, token_B: decoder.apply(variables, context, state, token_B, method="step"))
    token_B = tokens_BT[:, 0]
    for t in range(T):
        state, logits_BV = step(state, token_B)
        np.testing.assert_allclose(sampled_BTV[:, t], logits_BV, rtol=1e-3, atol=1e-4)
        token_B = logits_BV.argmax(axis=1)


def test_own_words_are_drawn_as_often_as_asked_and_as_likely_as_predicted():
    decoder, params, features_BPF, _ = made("lstm")
    params = {**jax.tree.map(jnp.zeros_like, params), "logits_bias": jnp.log(jnp.array([0.7, 0.2, 0.1] + [1e-9] * (V - 3)))}
    params["word_embedding"] = jnp.eye(V, E)  # the gates are zero: only what was read differs
    tokens_BT = jnp.full((400, 6), 3)
    kept = decoder.apply({"params": params}, jnp.zeros((400, 1, F)), tokens_BT, False, method="_draw_kept")
    _, words_TBE, _ = decoder.apply({"params": params}, jnp.zeros((400, 1, F)), tokens_BT, kept, jnp.float32(0.25),
                                    method="_sampled", rngs={"sampling": jax.random.key(5)})
    words = np.asarray(words_TBE)
    given = words[..., 3] == 1
    assert given[0].all()  # the first one is the start marker
    assert abs(given[1:].mean() - 0.75) < 0.03
    drawn = words[1:][~given[1:]][:, :3].mean(axis=0)
    np.testing.assert_allclose(drawn, [0.7, 0.2, 0.1], atol=0.06)


def test_a_gru_equals_its_equations_in_numpy():
    decoder, params, features_BPF, tokens_BT = made("lstm", cell="gru")
    p = jax.tree.map(np.asarray, params)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    h, logits = np.zeros((B, D)), []
    for x in [np.asarray(features_BPF).mean(1) @ p["image_embedding"], *(p["word_embedding"][tokens_BT[:, t]] for t in range(T))]:
        xz, xr, xn = np.split(x @ p["gru_kernel"][:E] + p["gru_bias"], 3, axis=1)
        hz, hr, hn = np.split(h @ p["gru_kernel"][E:] + p["gru_recurrent_bias"], 3, axis=1)
        z, r = sigmoid(xz + hz), sigmoid(xr + hr)
        h = z * h + (1 - z) * np.tanh(xn + r * hn)
        logits.append(h @ p["logits_kernel"] + p["logits_bias"])
    np.testing.assert_allclose(decoder.apply({"params": params}, features_BPF, tokens_BT), np.stack(logits[1:], 1), rtol=1e-4, atol=1e-5)


def test_nic_2014s_lstm_has_no_biases_and_no_second_tanh():
    decoder, params, features_BPF, tokens_BT = made("nic 2014")
    assert "lstm_bias" not in params
    p = jax.tree.map(np.asarray, params)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    c, h = np.zeros((B, D)), np.zeros((B, D))
    for x in [np.asarray(features_BPF).mean(1) @ p["image_embedding"], *(p["word_embedding"][tokens_BT[:, t]] for t in range(T))]:
        i, j, f, o = np.split(np.concatenate([x, h], 1) @ p["lstm_kernel"], 4, axis=1)
        c = sigmoid(f + 1.0) * c + sigmoid(i) * np.tanh(j)
        h = sigmoid(o) * c
    logits_BTV = decoder.apply({"params": params}, features_BPF, tokens_BT)
    np.testing.assert_allclose(logits_BTV[:, -1], h @ p["logits_kernel"] + p["logits_bias"], rtol=1e-4, atol=1e-5)


def test_attention_equals_show_attend_and_tells_equations_in_numpy():
    decoder, params, features_BPF, tokens_BT = made("show attend tell")
    p, a = jax.tree.map(np.asarray, params), np.asarray(features_BPF)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    c, h = np.split(np.tanh(a.mean(1) @ p["start_kernel"] + p["start_bias"]), 2, axis=1)
    logits, weights = [], []
    for t in range(T):
        y = p["word_embedding"][tokens_BT[:, t]]
        e = np.tanh(a @ p["key_kernel"] + p["key_bias"] + (h @ p["query_kernel"])[:, None]) @ p["energy"]
        alpha = np.exp(e) / np.exp(e).sum(1, keepdims=True)
        z = sigmoid(h @ p["gate_kernel"] + p["gate_bias"]) * (alpha[:, :, None] * a).sum(1)
        i, j, f, o = np.split(np.concatenate([y, z, h], 1) @ p["lstm_kernel"] + p["lstm_bias"], 4, axis=1)
        c = sigmoid(f + 1.0) * c + sigmoid(i) * np.tanh(j)
        h = sigmoid(o) * np.tanh(c)
        logits.append((y + h @ p["hidden_output"] + z @ p["seen_output"]) @ p["word_embedding"].T + p["logits_bias"])
        weights.append(alpha)
    logits_BTV, sown = decoder.apply({"params": params}, features_BPF, tokens_BT, mutable=["attention"])
    np.testing.assert_allclose(logits_BTV, np.stack(logits, 1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sown["attention"]["weights"][0], np.stack(weights, 1), rtol=1e-4, atol=1e-6)
    assert np.ptp(np.stack(weights, 1), axis=1).max() > 0.01  # words look at different places


def test_the_penalty_asks_that_every_position_is_looked_at_once():
    even_BTP = jnp.full((2, 4, 4), 0.25)
    one_BTP = jnp.zeros((2, 4, 4)).at[:, :, 0].set(1.0)
    mask_BT = jnp.ones((2, 4), bool)
    assert attention.doubly_stochastic(even_BTP, mask_BT) == 0
    assert attention.doubly_stochastic(one_BTP, mask_BT) == 2 * (9 + 3)
    half = attention.doubly_stochastic(even_BTP, mask_BT.at[:, 2:].set(False))
    assert half == 2 * 4 * 0.25


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_what_is_the_same_for_every_word_gets_the_sum_of_their_gradients(dtype, tolerance):
    x_BW = jax.random.normal(jax.random.key(0), (2, 3)).astype(dtype)
    d_TBW = jax.random.uniform(jax.random.key(1), (300, 2, 3)).astype(dtype)  # whose sum bfloat16 would lose on the way
    repeated_TBW, pull = jax.vjp(lambda x: cells.at_every_word(x, len(d_TBW)), x_BW)
    np.testing.assert_array_equal(repeated_TBW, jnp.broadcast_to(x_BW, d_TBW.shape))
    (d_BW,) = pull(d_TBW)
    assert d_BW.dtype == dtype
    np.testing.assert_allclose(d_BW, np.asarray(d_TBW, np.float64).sum(axis=0), rtol=tolerance)


@pytest.mark.parametrize("unroll", [1, 2, 8, 0])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_written_gradient_of_any_cell_equals_automatic_differentiation(cell, unroll):
    unit, keys = cells.get(cell), jax.random.split(jax.random.key(1), 4)
    gates = unit.gates * D
    x_TBG, kernel_DG = jax.random.normal(keys[0], (T, B, gates)), jax.random.normal(keys[1], (D, gates)) * 0.4
    bias_G, start = jax.random.normal(keys[2], (gates,)), unit.start(jax.random.normal(keys[3], (B, D)))

    def unrolled(x_TBG, kernel_DG, bias_G, state):
        hidden = []
        for x_BG in x_TBG:
            state = unit.step(x_BG, state.hidden_BD @ kernel_DG + bias_G, state)
            hidden.append(state.hidden_BD)
        return jnp.stack(hidden)

    def objective(run):
        return lambda *arguments: jnp.sum(jnp.sin(3 * run(*arguments)))

    arguments = x_TBG, kernel_DG, bias_G, start
    expected = jax.grad(objective(unrolled), (0, 1, 2, 3))(*arguments)
    found = jax.grad(objective(lambda *a: cells.scan(unit.step, *a, unroll)), (0, 1, 2, 3))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), expected, found)


@pytest.mark.usefixtures("compiled_as_for_users")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what XLA makes of a search for CPUs")
@pytest.mark.parametrize("options", [{}, {"image": "every"}, {"image": "attention", "attention_size": 16}, {"cell": "gru"}, {"layers": 2}])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_search_cuts_no_kernel_for_every_word_and_makes_logits_by_a_plain_product(options, drawn):
    decoder = Decoder(vocabulary=1000, features=48, embedding=64, hidden=64, **options)
    features_BPF = jnp.ones((32, 9, 48))
    variables = decoder.init(jax.random.key(0), features_BPF, jnp.zeros((32, 1), jnp.int32))

    def captions(variables, features_BPF):
        context, start = decoder.apply(variables, features_BPF, method="start")
        step = functools.partial(decoder.apply, variables, method="step")
        if drawn:
            return sampling.sample(step, context, start, jax.random.split(jax.random.key(0), 32), draws=2, max_words=5)
        return search.beam(step, context, start, batch=32, beam=3, max_words=5)

    computations = jax.jit(captions).lower(variables, features_BPF).compile().as_text().split("\n\n")
    kernels = [leaf.shape for name, leaf in variables["params"].items() if re.fullmatch(r"(lstm|gru)1?_kernel", name)]
    cut = {name for text in computations if " slice(" in text for rows, gates in kernels
           for name in re.findall(rf"^%(\S+) \(\S+: f32\[{rows},{gates}\]\)", text)}
    callers = [text for text in computations if any(re.search(rf"calls=%{re.escape(name)}(?![\w.])", text) for name in cut)]
    assert cut and all(text.startswith("ENTRY") for text in callers)
    products = [text for text in computations if " dot(" in text and "f32[1000]" in text]  # the bias tells the logits'
    assert not any(" reduce(" in text for text in products)

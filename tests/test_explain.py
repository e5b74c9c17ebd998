"""Maps of what a captioner looked at: they show the place that matters, word by word, and the picture shows them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jaxcap import explain, losses
from jaxcap.config import Config, Data, Encoder
from jaxcap.decoders.decoder import Decoder
from jaxcap.errors import UserError
from jaxcap.vocab import BOS, EOS, Vocab

WORDS = ("red", "green", "blue", "grey", "pink", "gold")
VOCAB = Vocab(("<pad>", "<bos>", "<eos>", "<unk>", *WORDS), (0,) * 10, min_count=1)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_attention_learns_to_look_where_the_word_is_and_nowhere_else(cell):
    """A photo of four places, a word in each; the caption reads them in order. Maps that do not differ from word to word, or
    miss the place, cannot write it."""
    random = np.random.default_rng(0)
    decoder = Decoder(vocabulary=10, features=10, cell=cell, image="attention", attention_size=24, embedding=12, hidden=32, dropout=0.0)

    def batch():
        words_BP = random.integers(4, 10, (64, 4))
        features_BPF = np.concatenate([np.eye(6)[words_BP - 4], np.broadcast_to(np.eye(4), (64, 4, 4))], axis=2)
        tokens_BT1 = np.concatenate([np.full((64, 1), BOS), words_BP, np.full((64, 1), EOS)], axis=1)
        return jnp.asarray(features_BPF, jnp.float32), jnp.asarray(tokens_BT1)

    params = decoder.init(jax.random.key(0), *batch())["params"]
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, features_BPF, tokens_BT1):
        def loss(params):
            logits_BTV = decoder.apply({"params": params}, features_BPF, tokens_BT1[:, :-1])
            return losses.cross_entropy_sum(logits_BTV, tokens_BT1[:, 1:]) / (tokens_BT1[:, 1:] != 0).sum()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for _ in range(400):
        params, state = step(params, state, *batch())
    features_BPF, tokens_BT1 = batch()
    logits_BTV, sown = decoder.apply({"params": params}, features_BPF, tokens_BT1[:, :-1], mutable=["attention"])
    assert (logits_BTV.argmax(2) == tokens_BT1[:, 1:]).mean() > 0.95
    weights_BTP = np.asarray(sown["attention"]["weights"][0])[:, :4]
    assert (weights_BTP.argmax(2) == np.arange(4)).mean() > 0.9
    assert np.ptp(weights_BTP, axis=1).min() > 0.3  # every place is looked at for one word and not for another


def run(**captioner) -> SimpleNamespace:
    """What `explain` takes of a run: a captioner that says "red" the likelier, the redder the photo's first quarter is."""

    def logits(params, features_BPF, inputs_BT):
        said = jnp.zeros((features_BPF.shape[0], inputs_BT.shape[1], 10))
        return said.at[:, :, 4].add(20 * features_BPF[:, :, 0])

    known = {"attends": False, "logits": logits, "folded": lambda params, batch_stats: jax.tree_util.Partial(lambda image_BHWC: image_BHWC[
        :, :8, :8].mean((1, 2))[:, None])}
    return SimpleNamespace(captioner=SimpleNamespace(**known | captioner), params={}, batch_stats={}, vocab=VOCAB, joined=(),
                           config=Config(data=Data(size=32), encoder=Encoder(size=32)))


def test_covering_a_place_shows_what_a_word_needs():
    image_HWC = np.zeros((32, 32, 3), np.uint8)
    image_HWC[:8, :8] = 255, 0, 0
    found = explain.Explainer(run()).explain(image_HWC, "red green")
    assert found.words == ["red", "green"] and not found.attends and found.maps_Thw.shape == (2, explain.GRID, explain.GRID)
    np.testing.assert_array_equal(found.image, image_HWC)
    red_hw, green_hw = found.maps_Thw
    assert red_hw.argmax() == 0 and red_hw[0, 0] > 1
    assert not red_hw[3:].any() and not red_hw[:, 3:].any()  # patches of a quarter that do not reach the red one
    assert not green_hw.any()  # without the red, "green" is the likelier


def test_attention_is_taken_word_by_word():
    table_VP = np.random.default_rng(0).dirichlet(np.ones(9), 10).astype(np.float32)  # where it looks after each word

    def attend(params, features_BPF, inputs_BT):
        return None, jnp.asarray(table_VP)[inputs_BT]

    found = explain.Explainer(run(attends=True, logits_and_attention=attend)).explain(np.zeros((32, 32, 3), np.uint8), "red pink red")
    np.testing.assert_allclose(found.maps_Thw, table_VP[[BOS, 4, 8]].reshape(3, 3, 3))  # what was read before each of the three


def test_the_picture_has_a_panel_a_word_and_each_its_own_scale():
    image = np.full((40, 40, 3), 90, np.uint8)
    maps_Thw = np.zeros((2, 3, 3))
    maps_Thw[0, 0, 0], maps_Thw[1, 2, 2] = 1e-3, 1.0  # a thousand times fainter, and as bright on its own scale
    sheet = explain.picture(explain.Explanation(image, ["red", "dog"], maps_Thw, attends=True))
    assert isinstance(sheet, Image.Image)
    gap, line, side = explain.SIDE // 14, explain.SIDE // 9, explain.SIDE
    panels = [np.asarray(sheet.crop((gap + i * (side + gap), gap + line, gap + i * (side + gap) + side, gap + line + side)), int)
              for i in range(3)]
    assert (panels[0] == 90).all()
    assert panels[1][:40, :40].sum() > 2 * panels[1][-40:, -40:].sum()
    assert panels[2][-40:, -40:].sum() > 2 * panels[2][:40, :40].sum()
    assert abs(panels[1][:40, :40].mean() - panels[2][-40:, -40:].mean()) < 2


def test_letters_that_a_font_lacks_are_found(tmp_path):
    own = explain.word_font()
    assert explain.lacking(["dog", "犬が", "a犬\ufe0f\u200d", "<unk>"], own) == ["犬", "が"]
    file = tmp_path / "font.ttf"
    file.write_bytes(own.font_bytes)
    assert explain.lacking(["犬"], explain.word_font(str(file))) == ["犬"]
    for bad in (str(tmp_path), str(tmp_path / "none.ttf"), "", "\0"):
        with pytest.raises(UserError, match="cannot be read .*; name a TrueType or OpenType file"):
            explain.word_font(bad)
    found = explain.Explanation(np.zeros((8, 8, 3), np.uint8), ["dog"], np.ones((1, 2, 2)), attends=True)
    plain, larger = (explain.picture(found, font=font) for font in (None, own.font_variant(size=23)))
    assert plain == explain.picture(found, font=own) and plain != larger


def test_another_font_has_other_letters():
    try:
        font = explain.word_font("DejaVuSans.ttf")
    except UserError:
        pytest.skip("DejaVu Sans is not installed here")
    assert explain.lacking(["собака", "كلب", "犬"], font) == ["犬"]
    assert explain.lacking(["كلب"], explain.word_font()) == list("كلب")


def test_how_far_attention_moves_and_how_wide_it_is():
    still_Thw, wandering_Thw = np.full((3, 2, 2), 0.25), np.eye(4).reshape(4, 2, 2)
    half_Thw = np.array([[[0.5, 0.5], [0, 0]], [[0.5, 0], [0.5, 0]]])
    explained = [explain.Explanation(np.zeros((8, 8, 3), np.uint8), ["a"] * len(maps), maps, attends=True)
                 for maps in (still_Thw, wandering_Thw, half_Thw, still_Thw[:1])]
    assert [one.moved for one in explained] == [0, 1, 0.5, 0]  # maps that are the same for every word are told from others
    np.testing.assert_allclose([one.places for one in explained], [4, 1, 2, 4])
    assert explain.told(explained[:1]) == "From one word to the next 0% of the attention moves; it is spread as over 4 of 4 places."
    assert " 50% of the attention moves; it is spread as over 2 of 4 " in explain.told(explained[:3])  # of one word nothing is told
    assert explain.told(explained[3:]) == explain.told([]) == ""
    occluded = explain.Explanation(explained[0].image, ["a", "b"], wandering_Thw[:2], attends=False)
    assert explain.told([occluded]) == ""  # nats are no shares


def test_no_words_no_maps_and_an_ensemble_is_refused():
    found = explain.Explainer(run()).explain(np.zeros((32, 32, 3), np.uint8), "")
    assert found.words == [] and explain.picture(found).width > explain.SIDE
    joined = run()
    joined.joined = (1, 2)
    with pytest.raises(UserError, match="leave out --with"):
        explain.Explainer(joined).explain(np.zeros((32, 32, 3), np.uint8), "red")

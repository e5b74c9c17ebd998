"""Runs that write together, averaged checkpoints, and the flags of `evaluate` and `caption` that say how to search."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxcap import caption, checkpoints, config, evaluate, inference, parallel, runs, vocab
from jaxcap import captioner as captioners
from jaxcap.data import records, shapes
from jaxcap.ensemble import Ensemble
from jaxcap.errors import UserError
from jaxcap.step import TrainState

WORDS = vocab.build(["a red square and two blue circles under the green star"], min_count=1)
SETTINGS = config.Config(
    data=config.Data(name="shapes", size=32), encoder=config.Encoder(name="small_cnn", size=24), eval_batch_size=8,
    decoder=config.Decoder(embedding=16, hidden=16, dropout=0.0), search=config.Search(max_words=7, min_words=2),
    phases=(config.Phase(train="all", steps=1, from_scratch=True),))


@functools.cache
def initial(configuration, words):
    return jax.jit(lambda key: captioners.build(configuration, words).init(key, config.encoder_size(configuration)))


def make_run(directory: Path, seed: int, *changes: str, words=WORDS, steps=(1, 2, 3), same=False) -> Path:
    """A run that was never trained; its decoder's weights are large, so that its captions differ."""
    configuration = config.change(config.override(SETTINGS, changes), {"data.dir": directory.parent / "data"})
    runs.create(directory, configuration, words)
    keeper = checkpoints.Checkpoints(directory / "checkpoints", configuration.checkpoints)
    for step in steps:
        key = jax.random.PRNGKey(seed if same else 10 * seed + step)
        params, batch_stats = initial(configuration, len(words))(key)
        params["decoder"] = jax.tree.map(lambda w: 12 * w, params["decoder"])
        keeper.save(TrainState(jnp.int32(step), params, batch_stats, (), key), {"step": step, "phase": 0, "phase_step": step, "words": len(words)})
    keeper.close()
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three runs that differ in seed, photo size, encoder size and decoder, and two that do not fit them."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 16, "val": 12})
        make_run(folder / "one", 1)
        make_run(folder / "two", 2, "data.size=40", "encoder.size=0", "decoder.hidden=24")
        make_run(folder / "still", 3, same=True)
        make_run(folder / "other", 4, words=vocab.build(["a red square and two blue circles under the green sun"], min_count=1),
                 steps=(1,))
        make_run(folder / "longer", 5, words=dataclasses.replace(WORDS, words=(*WORDS.words, "zebra"), counts=(*WORDS.counts, 1)),
                 steps=(1,))
        Image.new("RGB", (50, 40), (200, 30, 30)).save(folder / "red.png")
        Image.new("RGB", (40, 50), (30, 30, 200)).save(folder / "blue.png")
        yield folder


def written(capsys, folder, *flags, top=1) -> list[list[dict]]:
    photos = [str(folder / "red.png"), str(folder / "blue.png")]
    assert caption.main([*photos_last(flags), *photos, "--json", "--top", str(top)]) == 0
    return [json.loads(line)["captions"] for line in capsys.readouterr().out.splitlines()]


def photos_last(flags):
    run, *rest = map(str, flags)
    return [*rest, run]


def test_two_runs_write_with_the_mean_of_their_probabilities(folder):
    one, two = runs.load(folder / "one"), runs.load(folder / "two")
    both = runs.join([one, two])
    features = [np.random.default_rng(i).normal(size=(3, 1, one.captioner.spec.features)).astype(np.float32) for i in range(2)]
    token_N = jnp.repeat(jnp.array([5, 6, 7]), 2)

    def twice(state):
        return jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), state)

    context, state = both.captioner.start(both.params, tuple(features))
    next_state, log_probs_NV = both.captioner.stepper(both.params)(context, twice(state), token_N)
    probs = []
    for member, seen, after in zip((one, two), features, next_state):
        own_context, own_state = member.captioner.start(member.params, seen)
        expected, logits_NV = member.captioner.stepper(member.params)(own_context, twice(own_state), token_N)
        jax.tree.map(np.testing.assert_array_equal, after, expected)
        exp = np.exp(np.asarray(logits_NV, np.float64))
        probs.append(exp / exp.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(np.exp(log_probs_NV), np.mean(probs, axis=0), rtol=1e-5)


def test_a_run_together_with_itself_is_the_run(folder, capsys):
    alone = written(capsys, folder, folder / "one", top=3)
    together = written(capsys, folder, folder / "one", "--with", folder / "one", top=3)
    for expected, found in zip(alone, together, strict=True):
        assert [c["text"] for c in found] == [c["text"] for c in expected]
        np.testing.assert_allclose([c["log_prob"] for c in found], [c["log_prob"] for c in expected], rtol=1e-4)
    other = written(capsys, folder, folder / "one", "--with", folder / "two", top=3)
    assert [c["text"] for photo in other for c in photo] != [c["text"] for photo in alone for c in photo]


def test_captions_of_an_ensemble_have_the_probabilities_of_its_mean(folder):
    """Photos at the sizes of both, encoded, decoded over eight devices; probabilities against each model word by word."""
    members = [runs.load(folder / "one"), runs.load(folder / "two")]
    both = runs.join(members)
    devices = parallel.Parallel("pmap")  # shard_map is what the commands use
    random = np.random.default_rng(0)
    photos = tuple(random.integers(0, 256, (8, size, size, 3), np.uint8) for size in (32, 40))
    sizes = both.pack([config.encoder_size(m.config) for m in members])
    assert sizes == (24, 40) and isinstance(both.captioner, Ensemble)
    decode = inference.decoder(both.captioner, config.Search(beam=2, max_words=5), sizes, devices)
    found = jax.device_get(decode(*devices.replicate((both.params, inference.look(both.captioner, both.params, both.batch_stats))), devices.shard(photos)))
    words_BT = found.tokens_BKT[:, 0]
    mean_BTV = 0.0
    for member, image_BHWC in zip(members, photos):
        size = config.encoder_size(member.config)
        edge = (image_BHWC.shape[1] - size) // 2
        crop_BHWC = image_BHWC[:, edge:edge + size, edge:edge + size] / np.float32(255)
        features_BPF, _ = jax.jit(member.captioner.encode)(member.params, member.batch_stats, crop_BHWC)
        inputs_BT = np.insert(words_BT, 0, vocab.BOS, axis=1)
        mean_BTV += np.asarray(jax.nn.softmax(jax.jit(member.captioner.logits)(member.params, features_BPF, inputs_BT))) / 2
    for row, words_T in enumerate(words_BT):
        targets = [w for w in words_T if w] + [vocab.EOS] * bool(found.finished_BK[row, 0])
        expected = sum(np.log(mean_BTV[row, t, w]) for t, w in enumerate(targets))
        np.testing.assert_allclose(found.log_probs_BK[row, 0], expected, rtol=1e-3)


@pytest.mark.parametrize("names", [["one"], ["one", "two"]])
def test_photos_that_take_the_place_of_others_get_the_same_captions(folder, names, monkeypatch):
    """On CPUs the search over a split's features goes on with the next photo where one is done."""
    members = [runs.load(folder / name) for name in names]
    run = runs.join(members) if len(members) > 1 else members[0]
    random = np.random.default_rng(0)
    features = [random.normal(size=(40, 1, member.captioner.spec.features)).astype(np.float32) for member in members]
    split = records.Split(Path("nowhere"), "val", [str(i) for i in range(40)], [["a red square"]] * 40, {}, "")
    given, seen = [], inference.rows
    monkeypatch.setattr(inference, "rows", lambda array, size: given.append(size) or seen(array, size))

    def captions(line):
        monkeypatch.setattr(inference, "LINE", line)
        found = evaluate.Evaluator(run.config, run.captioner, run.vocab, parallel.Parallel("shard_map"), split,
                                   others=[(member.config, split) for member in members[1:]])
        return found.captions(run.params, run.batch_stats, tuple(features) if len(members) > 1 else features[0])

    alone, in_line = captions(1), captions(16)
    assert given == [8] * len(names) + [40 if jax.default_backend() == "cpu" else 8] * len(names)
    assert [caption.text for caption in in_line.values()] == [caption.text for caption in alone.values()]
    assert len({len(caption.text.split()) for caption in alone.values()}) > 1
    np.testing.assert_allclose([c.log_prob for c in in_line.values()], [c.log_prob for c in alone.values()], rtol=1e-4)


def test_lines_are_of_one_length_and_of_bounded_size():
    devices = parallel.Parallel("shard_map")
    search = config.Search()

    def length(count, width, batch_size=64, search=search):
        return inference.in_line(batch_size, search, devices, np.broadcast_to(np.float32(0), (count, 1, width)))

    if devices.platform != "cpu":
        assert length(1000, 1280) == 64
        return
    assert [length(count, 1280) for count in (5, 64, 65, 500, 1000, 1024, 1030, 5000)] == [64, 64, 128, 512, 1024, 1024, 576, 1024]
    assert length(1000, 100 * 1280) == 128  # 128 maps of half a MB are 62.5 MiB
    assert length(1000, 10000 * 1280) == 64
    assert length(1000, 1280, search=config.Search(sample=True)) == 64
    assert inference.in_line(64, search, devices, None) == 64


def test_evaluate_leaves_an_ensembles_results_beside_the_runs_own(folder, capsys):
    own = shutil.copytree(folder / "one", folder / "copy")
    assert evaluate.main([str(own)]) == 0
    before = (own / "results" / "val.json").read_bytes()
    assert evaluate.main([str(own), "--with", str(folder / "two")]) == 0
    assert "val+two" in capsys.readouterr().out
    assert (own / "results" / "val.json").read_bytes() == before
    assert len(json.loads((own / "results" / "val+two.json").read_text())) == 12
    scores = json.loads((own / "results" / "val+two.scores.json").read_text())
    assert scores["with"] == [str(folder / "two")] and scores["search"]["beam"] == 3
    shutil.copytree(folder / "two", folder / "elsewhere" / "two")
    for _ in range(2):  # one of the same name leaves the first one's alone, and finds its own again
        assert evaluate.main([str(own), "--with", str(folder / "elsewhere" / "two")]) == 0
    assert sorted(path.name for path in (own / "results").glob("val+*.json")) == [
        "val+two-2.json", "val+two-2.scores.json", "val+two.json", "val+two.scores.json"]
    assert json.loads((own / "results" / "val+two.scores.json").read_text()) == scores
    with pytest.raises(UserError, match="--claims measures one run"):
        evaluate.main([str(own), "--with", str(folder / "two"), "--claims"])


@pytest.mark.parametrize("name, words", [("other", "id 11 of its vocabulary is 'sun', not 'star'"),
                                         ("longer", "id 15 of its vocabulary is 'zebra', not absent")])
def test_another_vocabulary_is_refused_by_its_first_difference(folder, name, words):
    with pytest.raises(UserError, match=words) as error:
        caption.main([str(folder / "one"), str(folder / "red.png"), "--with", str(folder / "two"), "--with", str(folder / name)])
    assert str(folder / name) in str(error.value) and "\n" not in str(error.value)


def test_the_mean_of_checkpoints(folder):
    models = [runs.load(folder / "one", step=step) for step in (2, 3)]
    mean = runs.load(folder / "one", average=2)
    assert mean.step == 3
    expected = jax.tree.map(lambda a, b: (np.float64(a) + np.float64(b)) / 2, *[(m.params, m.batch_stats) for m in models])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (mean.params, mean.batch_stats), expected)
    # Equal checkpoints give the same bits, as a frozen encoder must for its cached features to be found.
    one, three = (runs.load(folder / "still", average=n) for n in (1, 3))
    jax.tree.map(np.testing.assert_array_equal, (one.params, one.batch_stats), (three.params, three.batch_stats))
    for n in (0, 4):
        with pytest.raises(UserError, match=rf"keeps 3 checkpoints of its last phase \(1, 2, 3\); {n} of them cannot be averaged"):
            runs.load(folder / "one", average=n)
    with pytest.raises(UserError, match="--step takes one checkpoint"):
        caption.main([str(folder / "one"), str(folder / "red.png"), "--step", "2", "--average", "2"])


def test_checkpoints_of_two_phases_are_not_averaged(tmp_path):
    run = make_run(tmp_path / "run", 1, steps=(1, 2, 3))
    (run / "checkpoints" / "1" / "position" / "metadata").write_text(
        json.dumps({"step": 1, "phase": -1, "phase_step": 1, "words": len(WORDS)}))
    assert runs.load(run, average=2).step == 3
    with pytest.raises(UserError, match=r"keeps 2 checkpoints of its last phase \(2, 3\); 3 of them cannot be averaged"):
        runs.load(run, average=3)


def test_flags_reach_the_search(folder, capsys):
    plain = written(capsys, folder, folder / "one", top=3)
    word = plain[0][0]["text"].split()[0]
    assert all(word not in c["text"].split() for photo in written(capsys, folder, folder / "one", "--forbid", word, top=3)
               for c in photo)
    missing = next(w for w in WORDS.words[4:] if w not in plain[0][0]["text"].split())
    required = written(capsys, folder, folder / "one", "--must-contain", missing, "--min-words", "3", "--no-repeat-ngram", "1")
    for (best, *_) in required:
        words = best["text"].split()
        assert missing in words and len(words) >= 3 and len(set(words)) == len(words)
    diverse = written(capsys, folder, folder / "one", "--groups", "2", "--diversity", "20", "--beam", "2", top=3)
    assert all(len({c["text"] for c in photo}) > 1 for photo in diverse)
    wide, agreed = (written(capsys, folder, folder / "one", "--beam", "6", *flags, top=6) for flags in ([], ["--consensus"]))
    assert [sorted(c["text"] for c in photo) for photo in wide] == [sorted(c["text"] for c in photo) for photo in agreed]
    assert wide != agreed
    drawn = [written(capsys, folder, folder / "one", "--sample", "--temperature", "2", "--seed", seed, "--batch-size", size, top=3)
             for seed, size in (("1", "8"), ("1", "1"), ("2", "8"))]
    texts = [[c["text"] for photo in captions for c in photo] for captions in drawn]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("flags, words", [
    (["--forbid", "squre"], "'squre' is not in the run's vocabulary of 15 words; near it are square"),
    (["--must-contain", "red square"], "'red square' is 2 words"),
    (["--must-contain", "red", "--forbid", "red"], "'red' stands both"),
    (["--nucleus", "0"], "search.nucleus must be above 0 and at most 1, not 0.0"),
    (["--nucleus", "0.5"], "search.nucleus changes how words are drawn, so it needs search.sample=true"),
    (["--sample", "--temperature", "0"], "search.temperature must be at least 0.000001"),
    (["--sample", "--temperature", "1e-40"], "search.temperature must be at least 0.000001"),
    (["--sample", "--seed", str(10**23)], "search.seed must be at least 0 and below"),
    (["--sample", "--groups", "3"], "search.sample cannot be combined"),
    (["--coverage", "0.5"], "search.coverage needs one model with attention"),
    (["--coverage", "0.5", "--sample"], "search.coverage changes which captions are best"),
    (["--consensus", "--sample"], "search.consensus ranks what a search found"),
    (["--diversity", "1"], "--diversity does nothing without --groups"),
    (["--seed", "1"], "--seed does nothing without --sample"),
    (["--consensus", "--beam", "1"], "--consensus does nothing without a --beam of at least 2"),
    (["--groups", "2"], "search.beam=3 cannot be divided into search.groups=2"),
    (["--groups", "3", "--must-contain", "red"], "cannot be combined"),
    (["--min-words", "9"], "search.min_words=9 is more than search.max_words=7"),
    (["--min-words", "0", "--max-words", "1", "--must-contain", "red", "--must-contain", "blue"], "names 2 words; at most 1"),
    (["--no-repeat-ngram", "-1"], "search.no_repeat_ngram must be at least 0"),
])
def test_flags_that_cannot_be_are_one_clear_sentence(folder, flags, words):
    with pytest.raises(UserError, match=words) as error:
        caption.main([str(folder / "one"), str(folder / "red.png"), *flags])
    assert "\n" not in str(error.value)


def test_coverage_adds_up_where_a_caption_looked():
    attending = captioners.build(config.change(SETTINGS, {"decoder.image": "attention"}), len(WORDS))
    features_BPF = 0.2 * jax.random.normal(jax.random.key(1), (2, 9, attending.spec.features))
    tokens_BT = jnp.array([[1, 5, 6], [1, 7, 4]])

    @jax.jit
    def both(key):
        params, _ = attending.init(key, 32)
        params["decoder"] = jax.tree.map(lambda w: 12 * w, params["decoder"])
        context, state = attending.start(params, features_BPF)
        step, penalty = inference.covering(attending, params, 0.5)
        covered = state, jnp.zeros(features_BPF.shape[:2])
        for t in range(3):
            covered, logits_BV = step(context, covered, tokens_BT[:, t])
        return logits_BV, penalty(covered), *attending.logits_and_attention(params, features_BPF, tokens_BT)

    logits_BV, penalty_B, expected_BTV, weights_BTP = both(jax.random.PRNGKey(0))
    np.testing.assert_allclose(logits_BV, expected_BTV[:, -1], rtol=1e-4, atol=1e-5)
    looked_BP = np.asarray(weights_BTP).sum(axis=1) * weights_BTP.shape[2]
    assert looked_BP.min() < 0.9 and looked_BP.max() > 1
    np.testing.assert_allclose(penalty_B, 0.5 * np.log(np.minimum(looked_BP, 1)).mean(axis=1), rtol=1e-4)


def test_rules_that_leave_nothing_to_write_are_said(folder):
    with pytest.raises(UserError, match="no caption can be written"):
        caption.main([str(folder / "one"), str(folder / "red.png"), "--min-words", "5", "--no-repeat-ngram", "1",
                      *(flag for word in WORDS.words[4:13] for flag in ("--forbid", word))])

"""The announcement's claims as numbers: measures worked out by hand, the probe on features that tell and that do not."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from jaxcap import captioner, checkpoints, claims, config, evaluate, metrics, parallel, prepare, ptb, runs, session, vocab
from jaxcap.errors import UserError

REFERENCES = {
    "sea": ["A brown dog runs on the beach.", "a brown and white dog", "a dog on grey sand"],
    "park": ["Two boys in red shirts", "two kids in red play", "boys in red and blue"],
    "street": ["A black-and-white photo of a street.", "an old street", "a street"],
}


def test_familiar_captions_and_new_ones_are_scored_apart():
    candidates = {"sea": "a brown dog runs on the beach", "park": "Two boys in red shirts .", "street": "two dogs on a beach"}
    found = claims.familiarity(candidates, REFERENCES, ["A brown dog runs on the beach .", "two boys in red shirts", "a wall"])
    assert (found["in_train"]["photos"], found["new"]["photos"]) == (2, 1)
    assert found["in_train"]["share"] == pytest.approx(2 / 3)
    assert found["in_train"]["bleu4"] == pytest.approx(100)  # both are references of their photos
    assert found["in_train"]["cider"] > 1 > found["new"]["cider"]
    assert found["first_reference_in_train"] == pytest.approx(2 / 3)


def test_no_familiar_caption_at_all_has_no_score():
    found = claims.familiarity({i: "a wall" for i in REFERENCES}, REFERENCES, [])
    assert found["in_train"] == {"photos": 0, "share": 0, "bleu4": None, "cider": None}
    assert found["new"]["share"] == 1


@pytest.mark.parametrize("caption, named", [
    ("A black-and-white photo of Grey walls", {"black", "white", "gray"}),
    ("a blonde girl in violet", {"blond", "purple"}), ("a reddish, tanned blackbird", set()), ("", set())])
def test_colour_words(caption, named):
    assert claims.colours_in(caption) == named


def test_colours_by_hand():
    # sea: brown is right (two of three say it, so it is also wanted), red is not. park: blue is right (one says it) but not
    # wanted, red is wanted and missing. street: nothing named; black and white are said by one of three only.
    candidates = {"sea": "a brown dog with a red ball", "park": "boys in blue", "street": "a street"}
    found = claims.colours(candidates, REFERENCES)
    assert (found["named"], found["right"], found["wanted"], found["found"]) == (3, 2, 2, 1)
    assert found["precision"] == pytest.approx(2 / 3) and found["recall"] == 0.5 and found["f1"] == pytest.approx(4 / 7)
    assert found["colours"]["red"] == {"precision": 0, "recall": 0, "f1": 0, "named": 1, "right": 0, "wanted": 1, "found": 0}
    assert found["colours"]["blue"]["precision"] == 1 and found["colours"]["blue"]["recall"] is None
    assert set(found["colours"]) == {"brown", "red", "blue"}
    # Beside the references of the next photo: brown and red by park's, where red is said; blue by street's.
    assert found["shuffled_precision"] == pytest.approx(1 / 3)


def test_captions_without_a_colour_have_no_precision():
    found = claims.colours({"a": "a dog"}, {"a": ["a dog", "a red dog"]})
    assert (found["precision"], found["recall"], found["f1"], found["colours"]) == (None, None, None, {})


def test_every_colour_word_means_one_colour():
    words = [word for words in claims.COLOURS.values() for word in words]
    assert len(words) == len(set(words)) and all(colour in words for colour in claims.COLOURS)


def test_content_words_are_counted_by_photo():
    captions = [["a dog and a dog", "dogs in the park"], ["the dog .", "a cat"], ["cat", "the sea"]]
    assert claims.content_words(captions, 3) == ["cat", "dog", "dogs"]


def test_captions_in_characters_are_told_apart_by_characters():
    tokenize = metrics.tokenizer(vocab.build(["犬が走る"], min_count=1, tokenizer="characters"))
    found = claims.familiarity({"a": "犬が走る。", "b": "猫がいる"}, {"a": ["犬が走る", "犬"], "b": ["猫がいた"]}, ["犬が走る"], tokenize)
    assert (found["in_train"]["photos"], found["new"]["photos"], found["first_reference_in_train"]) == (1, 1, 0.5)
    assert found["in_train"]["bleu4"] == pytest.approx(100) and found["new"]["cider"] > 1
    assert claims.content_words([["犬が走る。"], ["犬がいる"]], 3, tokenize) == ["が", "る", "犬"]


def test_average_precision_by_hand():
    # Ranked: present, absent, present, absent: precision 1 at the first, 2/3 at the third.
    found = claims._average_precision(np.array([[0.9, 1], [0.2, 1], [0.5, 1], [0.7, 1]]),
                                      np.array([[1, 0], [0, 0], [1, 0], [0, 0]], bool))
    assert found == pytest.approx([(1 + 2 / 3) / 2, 0])


def captions_of(present_NW, words):
    return [[" ".join(["photo", *(word for word, there in zip(words, row) if there)])] for row in present_NW]


def test_the_probe_reads_what_a_linear_map_can_and_nothing_from_noise():
    random = np.random.default_rng(0)
    words = ["apple", "bicycle", "castle", "dolphin"]
    present_NW = random.random((900, 4)) < 0.3
    captions = captions_of(present_NW, words)
    told_NF = (present_NW @ random.normal(size=(4, 20)) + 0.01 * random.normal(size=(900, 20))).astype(np.float32)
    told_NF = np.concatenate([told_NF, np.full((900, 1), 7, np.float32)], axis=1)  # a dead feature does no harm
    noise_NF = random.normal(size=(900, 20)).astype(np.float32)
    good = claims.probe(told_NF[:600], captions[:600], told_NF[600:], captions[600:])
    bad = claims.probe(noise_NF[:600], captions[:600], noise_NF[600:], captions[600:])
    assert set(good["words"]) == set(words)  # "photo" is on all photos and tells nothing
    assert good["map"] > 0.99
    assert abs(bad["map"] - bad["chance"]) < 0.08 and abs(bad["chance"] - 0.3) < 0.04
    scaled = claims.probe(told_NF[:600] * 1000 + 5, captions[:600], told_NF[600:] * 1000 + 5, captions[600:])
    assert scaled["map"] == pytest.approx(good["map"], abs=1e-3)


def test_ridge_is_the_closed_form():
    random = np.random.default_rng(1)
    x_NF, y_NW, other_MF = random.normal(size=(40, 5)), random.random((40, 3)), random.normal(size=(6, 5))
    z_NF, z_MF = (x_NF - x_NF.mean(0)) / x_NF.std(0), (other_MF - x_NF.mean(0)) / x_NF.std(0)
    expected = z_MF @ np.linalg.solve(z_NF.T @ z_NF + 40 * 0.5 * np.eye(5), z_NF.T @ (y_NW - y_NW.mean(0)))
    np.testing.assert_allclose(claims._ridge(x_NF, y_NW, other_MF, [0.5])[0], expected, atol=1e-12)


def test_a_probe_without_anything_to_tell_apart_says_so():
    features_NF = np.ones((20, 3), np.float32)
    with pytest.raises(UserError, match="content word"):
        claims.probe(features_NF, [["a dog"]] * 20, features_NF, [["a dog"]] * 20)
    with pytest.raises(UserError, match="at least 10 train photos"):
        claims.probe(features_NF[:3], [["a dog"]] * 3, features_NF, [["a dog"]] * 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on one-coloured photos with checkpoints of two phases, of which the second trains the encoder; no step is taken."""
    root = tmp_path_factory.mktemp("claims")
    (root / "photos").mkdir()
    lines = []
    for i in range(40):
        name, rgb = (("red", (220, 40, 40)), ("green", (40, 180, 60)))[i % 2]
        Image.new("RGB", (32, 32), rgb).save(root / "photos" / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "captions": [f"a {name} wall .", f"the wall is {name} ."],
                                 "split": "val" if i >= 32 else "train"}))
    (root / "captions.jsonl").write_text("\n".join(lines))
    assert not prepare.main(["folder", "--source", str(root / "photos"), "--captions", str(root / "captions.jsonl"), "--label",
                             "tiny", "--size", "32", "--data-dir", str(root / "data")])
    configuration = config.check(config.Config(
        batch_size=8, eval_batch_size=8, data=config.Data("folder", str(root / "data"), "tiny", 32, max_words=8),
        decoder=config.Decoder(embedding=8, hidden=8), search=config.Search(beam=1, max_words=4),
        phases=(config.Phase("decoder", steps=4), config.Phase("everything", "all", steps=12, batch_norm="batch"))))
    words = vocab.build(["a red wall .", "the wall is green ."], min_count=1)
    state = session.initial_state(configuration, captioner.build(configuration, len(words)), parallel.Parallel("shard_map"))
    state = jax.tree.map(jax.numpy.asarray, jax.device_get(state))  # on one device, which is quicker to save
    directory = root / "run"
    runs.create(directory, configuration, words)
    keeper = checkpoints.Checkpoints(directory / "checkpoints", configuration.checkpoints)
    for number, step in enumerate((4, 16)):
        keeper.save(state._replace(step=np.int32(step), params=jax.tree.map(lambda x: x * (1 + number), state.params)),
                    {"step": step, "phase": number, "phase_step": step - 4 * number, "words": len(words)})
    keeper.close()
    return directory


def test_claims_of_a_run(run, capsys):
    assert evaluate.main([str(run), "--claims", "--step", "16"]) == 0
    shown = capsys.readouterr().out
    assert "word for word in train" in shown and "linear probe" in shown
    measured = json.loads((run / "results" / "val.step16.claims.json").read_text("utf-8"))
    assert (measured["split"], measured["step"]) == ("val", 16)
    assert list(measured["colours"]) == ["decoder, step 4", "everything, step 16"]  # before and after fine-tuning
    assert list(measured["probe"]) == ["first weights (random)", "step 16"]
    assert measured["colours_of_first_references"]["f1"] == 1
    assert measured["familiarity"]["first_reference_in_train"] == 1
    for probe in measured["probe"].values():
        assert set(probe["words"]) == {"green", "red"} and 0 < probe["map"] <= 1
    captions = {item["image_id"]: item["caption"] for item in json.loads((run / "results" / "val.step16.json").read_text())}
    assert measured["colours"]["everything, step 16"]["named"] == sum(len(claims.colours_in(c)) for c in captions.values())


def test_claims_of_an_encoder_that_was_not_trained_have_one_probe(run):
    assert evaluate.main([str(run), "--claims", "--step", "4"]) == 0
    measured = json.loads((run / "results" / "val.step4.claims.json").read_text("utf-8"))
    assert list(measured["probe"]) == ["step 4"] and list(measured["colours"]) == ["decoder, step 4"]


def test_claims_are_measured_in_the_vocabularys_tokens(run, monkeypatch):
    monkeypatch.setattr(metrics, "tokenizer", lambda vocabulary: lambda text: ptb.tokenize(text).replace("red", "犬"))
    assert evaluate.main([str(run), "--claims", "--step", "4"]) == 0
    measured = json.loads((run / "results" / "val.step4.claims.json").read_text("utf-8"))
    assert set(measured["probe"]["step 4"]["words"]) == {"green", "犬"}


def test_claims_of_a_run_that_goes_on_from_another_begin_with_that_one(run, tmp_path):
    further = tmp_path / "further"
    shutil.copytree(run, further)
    for start, expected in ((str(run), ["start, step 16", "step 16"]), (str(tmp_path / "gone"), ["step 16"])):
        text = json.loads((run / "config.json").read_text("utf-8"))
        (further / "config.json").write_text(json.dumps(text | {"start": start}), encoding="utf-8")
        assert evaluate.main([str(further), "--claims", "--step", "16"]) == 0
        measured = json.loads((further / "results" / "val.step16.claims.json").read_text("utf-8"))
        assert list(measured["probe"]) == expected
        assert [name for name in measured["colours"] if name.startswith("start")] == expected[:-1]


def test_results_that_cannot_be_written_are_one_sentence(tmp_path):
    (tmp_path / "results").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot be written"):
        claims.write(tmp_path, "val", {})

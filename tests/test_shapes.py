"""Shapes: the same pictures every time, captions that are true, and pairs that training never sees."""

import json
import re

import numpy as np
import pytest

from jaxcap import config
from jaxcap.data import records, scenes, shapes

SPLITS = ("train", "val", "test", "novel")


def some(split: str, count: int = 300) -> list[scenes.Scene]:
    return [scenes.scene(shapes.SEED, split, i) for i in range(count)]


def pairs(of: scenes.Scene) -> set[tuple[str, str]]:
    return {(thing.colour, thing.shape) for thing in of.things}


def test_a_scene_depends_on_seed_split_and_index_alone():
    assert some("val", 20) == some("val", 20)
    assert scenes.scene(0, "val", 3) != scenes.scene(1, "val", 3) != scenes.scene(1, "test", 3)
    scene = scenes.scene(0, "train", 7)
    np.testing.assert_array_equal(shapes.paint(scene, 64), shapes.paint(scene, 64))
    assert scenes.captions(scene) == scenes.captions(scene)


@pytest.mark.parametrize("split", SPLITS)
def test_novel_pairs_are_in_novel_and_nowhere_else(split):
    found = set().union(*map(pairs, some(split, 1000)))
    assert found == (scenes.HELD_OUT if split == "novel" else scenes.FAMILIAR)


def test_every_colour_and_shape_of_novel_is_familiar():
    for side, names in enumerate((scenes.COLOURS, scenes.SHAPES)):
        assert {pair[side] for pair in scenes.FAMILIAR} == {pair[side] for pair in scenes.HELD_OUT} == set(names)


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_five_different_true_ones(split):
    for scene in some(split):
        captions = scenes.captions(scene)
        assert len(set(captions)) == scenes.REFERENCES == 5
        objects = [{"colour": thing.colour, "shape": thing.shape} for thing in scene.things]
        for caption in captions:
            assert scenes.correct(caption, objects) == (True, True, True), caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|[{}]| ,|  ", caption), caption
        relations = " ".join(captions)
        if scene.arrangement == "beside":
            assert not re.search(r"\b(above|below|under|over)\b", relations)


def test_every_kind_of_scene_comes():
    scenes_seen = some("train", 2000)
    assert {len(scene.things) for scene in scenes_seen} == {1, 2, 3}
    assert set(scenes.ARRANGEMENTS) < {scene.arrangement for scene in scenes_seen}
    assert {scene.background for scene in scenes_seen} == set(scenes.BACKGROUNDS)
    assert {thing.size for scene in scenes_seen for thing in scene.things} == {"small", "large"}
    assert any(len(scene.things) == 2 and len(pairs(scene)) == 1 for scene in scenes_seen)


@pytest.mark.parametrize("caption, named", [
    ("a red star and a small blue moon.", [("red", "star"), ("blue", "moon")]),
    ("A pair of pink crosses", [("pink", "cross")] * 2),
    ("two large black circles, one above the other", [("black", "circle")] * 2),
    ("a star", [("", "star")]),
    ("a red red star", [("red", ""), ("red", "star")]),
    ("green", [("green", "")]),
    ("", []),
])
def test_attributes(caption, named):
    assert sorted(scenes.attributes(caption).elements()) == sorted(named)


def test_right_means_no_more_and_no_less():
    objects = [{"colour": "red", "shape": "star"}, {"colour": "blue", "shape": "moon"}]
    assert scenes.correct("a blue star above a red moon", objects) == (True, True, False)
    assert scenes.correct("a red star", objects) == (False, False, False)
    assert scenes.correct("a red star, a blue moon and a blue moon", objects) == (False, False, False)
    assert scenes.correct("a blue moon next to a red star", objects) == (True, True, True)


def test_objects_have_the_colour_that_the_captions_say():
    for scene in some("val", 60):
        picture = shapes.paint(scene, 64).astype(int)
        for thing in scene.things:
            if thing.shape in ("moon", "star"):
                continue  # whose middle may be empty or narrow
            middle = picture[round(64 * thing.y), round(64 * thing.x)]
            assert np.abs(middle - shapes._RGB[thing.colour]).max() < 60, thing


def test_the_data_set_is_made_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 12, "novel": 4})
    data = config.Data(name="shapes", size=48, dir=str(tmp_path))
    split = records.open_split(data, "novel")
    assert len(split) == 4 and split.image(0).shape == (48, 48, 3) and len(split.captions[0]) == 5
    np.testing.assert_array_equal(split.image(2), shapes.paint(scenes.scene(shapes.SEED, "novel", 2), 48))
    assert {thing["shape"] for text in split.extra["objects"] for thing in json.loads(text)} <= set(scenes.SHAPES)
    assert set(records.splits(data)) == {"train", "novel"}

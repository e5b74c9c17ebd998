"""Flickr8k's layout, read from a small copy of it that the test makes, and from the real one where it is."""

import cv2
import numpy as np
import pytest

from jaxcap.data import flickr8k
from jaxcap.errors import UserError

CAPTIONS = {f"{i}_{i:04x}.jpg": [f"a dog number {i} runs .", "Ein Hund läuft ."] for i in range(8)}
LISTS = {"train": [0, 1, 2, 3], "dev": [4, 5], "test": [6, 7]}


@pytest.fixture
def layout(tmp_path):
    """A directory as Flickr8k is distributed, with eight tiny photos."""
    (tmp_path / "Flicker8k_Dataset").mkdir()
    text = tmp_path / "Flickr8k_text"
    text.mkdir()
    names = list(CAPTIONS)
    for i, name in enumerate(names):
        cv2.imwrite(str(tmp_path / "Flicker8k_Dataset" / name), np.full((12, 16, 3), 30 * i, np.uint8))
    lines = [f"{name}#{k}\t{caption}\n" for name, captions in CAPTIONS.items() for k, caption in enumerate(captions)]
    (text / "Flickr8k.token.txt").write_text("".join(lines), "utf-8")
    for split, members in LISTS.items():
        (text / f"Flickr_8k.{split}Images.txt").write_text("".join(names[i] + "\n" for i in members))
    return tmp_path


def names(plan, split):
    return [photo.image_id for photo in plan.splits[split]]


def test_every_listed_photo_has_its_captions(layout):
    plan = flickr8k.plan(layout)
    assert {split: len(items) for split, items in plan.splits.items()} == {"train": 4, "val": 2, "test": 2}
    assert plan.problems == ()
    for photo in [photo for items in plan.splits.values() for photo in items]:
        assert list(photo.captions) == CAPTIONS[photo.image_id]
        assert str(photo.source).endswith("Flicker8k_Dataset/" + photo.image_id)


def test_a_split_without_list_or_photos_is_not_offered(layout):
    (layout / "Flickr8k_text" / "Flickr_8k.testImages.txt").unlink()
    assert list(flickr8k.plan(layout).splits) == ["train", "val"]
    for name in names(flickr8k.plan(layout), "val"):
        (layout / "Flicker8k_Dataset" / name).unlink()
    assert list(flickr8k.plan(layout).splits) == ["train"]


def test_what_has_no_partner_is_named(layout):
    tokens = layout / "Flickr8k_text" / "Flickr8k.token.txt"
    tokens.write_text(tokens.read_text("utf-8").replace(f"{list(CAPTIONS)[1]}#", "lonely.jpg.1#"), "utf-8")
    (layout / "Flicker8k_Dataset" / list(CAPTIONS)[2]).unlink()
    plan = flickr8k.plan(layout)
    assert names(plan, "train") == [list(CAPTIONS)[0], list(CAPTIONS)[3]]
    assert set(plan.problems) == {
        "lonely.jpg.1: has captions but no photo",
        "2_0002.jpg: has captions but no photo",
        "1_0001.jpg: is listed in Flickr_8k.trainImages.txt but has no captions",
    }


def test_the_real_one(shared):
    plan = flickr8k.plan(shared("flickr8k"))
    assert {split: len(items) for split, items in plan.splits.items()} == {"train": 6000, "val": 1000}
    assert plan.problems == ("2258277193_586949ec62.jpg.1: has captions but no photo",)
    assert all(len(photo.captions) == 5 for items in plan.splits.values() for photo in items)


def test_bad_directories_are_explained(layout, tmp_path):
    with pytest.raises(UserError, match="absent.*does not exist"):
        flickr8k.plan(tmp_path / "absent")
    with pytest.raises(UserError, match="has no directory Flicker8k_Dataset"):
        flickr8k.plan(layout / "Flickr8k_text")
    tokens = layout / "Flickr8k_text" / "Flickr8k.token.txt"
    tokens.write_text("0_0000.jpg#0\ta dog\n0_0000.jpg a dog without a tab\n")
    with pytest.raises(UserError, match="line 2 of .*token.txt"):
        flickr8k.plan(layout)
    tokens.write_text("0_0000.jpg#0\t\n0_0000.jpg#1\t  \n")
    with pytest.raises(UserError, match="holds no captions"):
        flickr8k.plan(layout)
    tokens.write_text("other.jpg#0\ta dog\n")
    with pytest.raises(UserError, match="none of the photos"):
        flickr8k.plan(layout)
    tokens.write_bytes(b"0_0000.jpg#0\ta d\xf6g\n")
    with pytest.raises(UserError, match="cannot read .*token.txt"):
        flickr8k.plan(layout)
    tokens.unlink()
    with pytest.raises(UserError, match="there is no .*token.txt"):
        flickr8k.plan(layout)

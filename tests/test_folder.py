"""A person's own photos and captions, in every format that they may come in, and what is said about bad ones."""

import errno
import json
import os
import re
import shutil
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest

from jaxcap import caption, config, prepare
from jaxcap.data import captions, folder, photos, places, records
from jaxcap.errors import UserError

CAPTIONS = {
    "hund.jpg": ("Ein Hund läuft über die Straße.", "a dog"),
    "犬/犬 一.png": ("公園で犬が走っている。",),
    "café.webp": ("un café noir", "чашка кофе", "قهوة"),
    "deep/er/cat.jpg": ('a "cat", sitting', "a cat; sleeping | here"),
}
SPLITS = {"hund.jpg": "train", "犬/犬 一.png": "val", "café.webp": "train", "deep/er/cat.jpg": "test"}


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "my photos"
    for i, name in enumerate(CAPTIONS):
        add_photo(root / name, i)
    return root


def add_photo(path: Path, value: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, np.full((10, 14, 3), 40 * value, np.uint8))[1].tobytes())


def as_csv(delimiter=",", with_split=True):
    def quoted(cell):
        return '"' + cell.replace('"', '""') + '"'

    lines = [delimiter.join(["image", "caption"] + ["split"] * with_split)]
    for name, texts in CAPTIONS.items():
        lines += [delimiter.join([name, quoted(text)] + [SPLITS[name]] * with_split) for text in texts]
    return "\n".join(lines) + "\n"


def as_jsonl(many):
    items = one_a_photo() if many else [{"image": name, "caption": text, "split": SPLITS[name]}
                                        for name, texts in CAPTIONS.items() for text in texts]
    return "".join(json.dumps(item, ensure_ascii=many) + "\n" for item in items)


def one_a_photo():
    return [{"image": name, "captions": texts, "split": SPLITS[name]} for name, texts in CAPTIONS.items()]


def as_karpathy():
    images = []
    for name, texts in CAPTIONS.items():
        directory, _, base = name.rpartition("/")
        images.append({"filename": base, "filepath": directory, "split": SPLITS[name],
                       "sentences": [{"raw": text, "tokens": []} for text in texts]})
    return json.dumps({"dataset": "mine", "images": images}, ensure_ascii=False)


def as_coco():
    return json.dumps({
        "images": [{"id": 100 + i, "file_name": name} for i, name in enumerate(CAPTIONS)],
        "annotations": [{"id": 0, "image_id": 100 + i, "caption": text}
                        for i, texts in enumerate(CAPTIONS.values()) for text in texts],
    })


FILES = {
    "comma.csv": as_csv(), "tab.tsv": as_csv("\t"), "semicolon.csv": as_csv(";"), "bar.txt": as_csv("|"),
    "windows.csv": "\ufeff" + as_csv().replace("\n", "\r\n"),
    "names.csv": as_csv().replace("image,caption,split", "File_Name, TEXT ,Split", 1),
    "one.jsonl": as_jsonl(False), "many.jsonl": as_jsonl(True),
    "names.jsonl": as_jsonl(False).replace('"image"', '"filename"').replace('"caption"', '"Comment"'),
    "more.jsonl": as_jsonl(True).replace('"captions"', '"text": "beside them", "captions"'),
    "list.json": json.dumps(one_a_photo()),
    "karpathy.json": as_karpathy(),
}


def written(tmp_path, name, text) -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_format_says_the_same(name, source, tmp_path):
    plan = folder.plan(source, written(tmp_path, name, FILES[name]))
    assert plan.problems == () and list(plan.splits) == ["train", "val", "test"]
    found = {str(photo.source.path.relative_to(source)): (photo.captions, split)
             for split, photos in plan.splits.items() for photo in photos}
    assert found == {name: (texts, SPLITS[name]) for name, texts in CAPTIONS.items()}


def test_kaggles_flickr30k_is_read(tmp_path):
    lines = ["image_name| comment_number| comment", '1.jpg| 0| A man , "so called" , sits .', "1.jpg| 1| One man .", "2.jpg| 0| A dog ."]
    file = written(tmp_path, "results.csv", "\n".join(lines))
    assert [(entry.name, entry.captions) for entry in captions.read(file)] == [
        ("1.jpg", ('A man , "so called" , sits .', "One man .")), ("2.jpg", ("A dog .",))]
    with pytest.raises(UserError, match="line 5 of .* has 2 cells where the first line has 3; a separator is missing"):
        captions.read(written(tmp_path, "results.csv", "\n".join([*lines, "2.jpg| 4   A dog runs ."])))


def test_splits_of_ones_own_are_pointed_at(source, tmp_path, capsys):
    file = written(tmp_path, "c.csv", "image,caption,split\nhund.jpg,a dog,train\ncat.jpg,a cat,trian\ncafé.webp,coffee,restval\n")
    assert prepare.main(["folder", "--source", str(source), "--captions", str(file), "--label", "x", "--size", "8", "--data-dir", str(tmp_path / "d")]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("beware")] == [
        "beware    trian is a split of its own, none of train, restval, val, test: mend the caption file, or name it in data.train or data.val"]


def test_one_photo_is_no_val_split_and_what_to_do_is_said(source, tmp_path):
    arguments = ["folder", "--source", str(source), "--captions", str(written(tmp_path, "c.csv", "image,caption\nhund.jpg,a dog\n"))]
    assert prepare.main([*arguments, "--label", "one", "--size", "8", "--data-dir", str(tmp_path / "d")]) == 0
    with pytest.raises(UserError, match="no split 'val'; it offers train: set data.val=train .evaluate: --split train., or prepare it again with --force, "
                                        "from a caption file that puts photos into val, or one without splits and a --val-share above 0$"):
        records.open_split(config.Data(name="folder", label="one", size=8, dir=str(tmp_path / "d")), "val")


def test_coco_keeps_its_ids_and_splits_by_hash(source, tmp_path):
    plan = folder.plan(source, written(tmp_path, "captions.json", as_coco()))
    photos = [photo for photos in plan.splits.values() for photo in photos]
    assert {photo.image_id: photo.captions for photo in photos} == {
        str(100 + i): texts for i, texts in enumerate(CAPTIONS.values())}
    assert len(plan.splits["train"]) >= 1 and len(plan.splits["val"]) >= 1  # even so few photos have both


def test_prepared_and_read_back(source, tmp_path, capsys):
    (source / "deep" / "er" / "cat.jpg").write_bytes(b"")
    file = written(tmp_path, "captions.csv", as_csv())
    arguments = ["--source", str(source), "--captions", str(file), "--label", "tiere-1", "--size", "8"]
    assert prepare.main(["folder", *arguments, "--data-dir", str(tmp_path / "data")]) == 0
    assert "left out  deep/er/cat.jpg: it is empty" in capsys.readouterr().out
    data = config.Data(name="folder", label="tiere-1", size=8, dir=str(tmp_path / "data"))
    assert places.prepared_path(data) == tmp_path / "data" / "folder-tiere-1" / "8" / "1.0.0"
    assert records.splits(data) == ["train", "val"]
    split = records.open_split(data, "train+val")
    assert split.image_ids == ["hund.jpg", "café.webp", "犬/犬 一.png"]
    assert split.captions == [list(CAPTIONS[name]) for name in split.image_ids]
    assert [int(split.image(i)[0, 0, 0]) for i in range(3)] == [0, 80, 40]


def test_other_captions_or_shares_under_the_same_label_are_refused(source, tmp_path, capsys):
    file, data = written(tmp_path, "first.csv", as_csv()), config.Data(name="folder", label="pets", size=8, dir=str(tmp_path / "data"))
    arguments = ["folder", "--source", str(source), "--label", "pets", "--size", "8", "--data-dir", data.dir, "--captions"]
    assert prepare.main([*arguments, str(file)]) == 0
    path = places.prepared_path(data)
    assert prepare.main([*arguments, str(written(tmp_path, "copy.csv", as_csv()))]) == 0  # the same in another place
    other = written(tmp_path, "second.csv", as_csv().replace("a dog", "a hound"))
    with pytest.raises(UserError, match=f"pets/8/1.0.0 was made from other captions .{file}, as .* --force .* another --label"):
        prepare.main([*arguments, str(other)])
    with pytest.raises(UserError, match="pets/8/1.0.0 was made with --val-share 0.05 --test-share 0.05; use --force .* another --label"):
        prepare.main([*arguments, str(file), "--val-share", "0.5"])
    assert records.open_split(data, "train").captions[0][1] == "a dog"
    (path / "made_of.json").write_text("[1", encoding="utf-8")  # damaged: nothing is known of its captions
    assert prepare.main([*arguments, str(other)]) == 0 and "already prepared" in capsys.readouterr().out.splitlines()[-1]
    assert prepare.main([*arguments, str(other), "--force"]) == 0
    assert records.open_split(data, "train").captions[0][1] == "a hound" and str(other) in (path / "made_of.json").read_text("utf-8")


def test_other_photos_under_the_same_label_are_refused_and_photos_that_are_gone_are_not_missed(source, tmp_path, capsys):
    file = written(tmp_path, "captions.csv", as_csv() + "broken.jpg,lost,train\n")
    arguments = ["folder", "--source", str(source), "--captions", str(file), "--label", "pets", "--size", "8", "--data-dir", str(tmp_path / "data")]
    (source / "broken.jpg").symlink_to(source / "nowhere")
    assert prepare.main(arguments) == 0
    (source / "without captions.jpg").write_bytes(b"1")  # it was never part of the data set
    assert prepare.main(arguments) == 0 and "already prepared" in capsys.readouterr().out
    copied = shutil.copytree(source, tmp_path / "copied", symlinks=True)
    assert prepare.main([*arguments, "--source", str(copied)]) == 0
    with (copied / "hund.jpg").open("ab") as photo:
        photo.write(b"more")
    with pytest.raises(UserError, match="was made from other photos than .*copied has now; use --force .* another --label"):
        prepare.main([*arguments, "--source", str(copied)])
    assert prepare.main([*arguments, "--source", str(copied), "--force"]) == 0
    shutil.rmtree(copied)
    assert prepare.main([*arguments, "--source", str(copied)]) == 0 and "already prepared" in capsys.readouterr().out.splitlines()[-1]


def test_a_split_by_hash_is_stable_and_has_the_shares(tmp_path):
    names = [f"{i:04d}.jpg" for i in range(2000)]
    root = tmp_path / "many"
    root.mkdir()
    for name in names:
        (root / name).touch()

    def assigned(some):
        file = written(tmp_path, "c.csv", "image,caption\n" + "".join(f"{name},x\n" for name in some))
        plan = folder.plan(root, file, 0.1, 0.2)
        return {photo.image_id: split for split, photos in plan.splits.items() for photo in photos}

    everything = assigned(names)
    counts = {split: list(everything.values()).count(split) for split in ("train", "val", "test")}
    assert abs(counts["val"] - 200) < 50 and abs(counts["test"] - 400) < 70 and sum(counts.values()) == 2000
    half = assigned(names[::-2])
    assert half == {name: everything[name] for name in half}


def test_names_are_found_in_subdirectories_and_in_either_unicode_form(source, tmp_path):
    decomposed = unicodedata.normalize("NFD", "café.webp")
    assert decomposed != "café.webp"
    lines = [{"image": "cat.jpg", "caption": "by name alone"}, {"image": "my photos/hund.jpg", "caption": "from above"},
             {"image": "犬\\犬 一.png", "caption": "as Windows writes"}, {"image": decomposed, "caption": "decomposed"}]
    plan = folder.plan(source, written(tmp_path, "c.jsonl", "\n".join(map(json.dumps, lines))), 0, 0)
    assert plan.problems == ()
    assert {str(photo.source.path.relative_to(source)) for photo in plan.splits["train"]} == set(CAPTIONS)


def test_an_ambiguous_or_wrong_path_is_no_photo(source, tmp_path):
    add_photo(source / "other" / "cat.jpg")
    file = written(tmp_path, "c.csv", "image,caption\ncat.jpg,which\nelsewhere/er/cat.jpg,not there\nhund.jpg,fine\n")
    plan = folder.plan(source, file, 0, 0)
    assert [photo.image_id for photo in plan.splits["train"]] == ["hund.jpg"]
    assert plan.problems[:2] == (
        "cat.jpg: could be deep/er/cat.jpg or other/cat.jpg; write the path, not only the name",
        "elsewhere/er/cat.jpg: has captions but no photo")


def test_photos_of_one_name_in_two_folders_have_ids_of_their_own(source, tmp_path):
    add_photo(source / "other" / "cat.jpg")
    images = [{"filename": name, "filepath": where, "split": "train", "sentences": [{"raw": "a cat"}]}
              for where, name in (("deep/er", "cat.jpg"), ("other", "cat.jpg"), ("", "hund.jpg"))]
    plan = folder.plan(source, written(tmp_path, "c.json", json.dumps({"images": images})), 0, 0)
    assert [photo.image_id for photo in plan.splits["train"]] == ["deep/er/cat.jpg", "other/cat.jpg", "hund.jpg"]


def test_what_has_no_partner_is_named(source, tmp_path):
    add_photo(source / "silent.jpg")
    (source / "notes.txt").write_text("no photo")
    file = written(tmp_path, "c.csv", "image,caption\nhund.jpg,a dog\nhund.jpg,\ncafé.webp,  \ngone.jpg,a ghost\n"
                                      "cat.jpg,a cat\n犬/犬 一.png,犬\n")
    plan = folder.plan(source, file, 0, 0)
    assert {photo.image_id: photo.captions for photo in plan.splits["train"]} == {
        "hund.jpg": ("a dog",), "cat.jpg": ("a cat",), "犬/犬 一.png": ("犬",)}
    assert set(plan.problems) == {"café.webp: has no caption that is not empty", "gone.jpg: has captions but no photo",
                                  "silent.jpg: has no captions"}


def closed(monkeypatch, folder_name):
    """From here on the folder of that name cannot be listed, as for anyone but root without the right to."""
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == folder_name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def test_a_folder_that_cannot_be_listed_is_named(source, tmp_path, monkeypatch):
    closed(monkeypatch, "deep")
    plan = folder.plan(source, written(tmp_path, "c.csv", "image,caption\nhund.jpg,a dog\ncat.jpg,a cat\n"), 0, 0)
    assert "deep: the folder cannot be read (Permission denied)" in plan.problems and len(plan.splits["train"]) == 1
    everything = caption.find([source])
    assert source / "deep" in everything and source / "hund.jpg" in everything and source / "deep/er/cat.jpg" not in everything
    with pytest.raises(photos.DamagedPhoto, match="cannot be read"):
        photos.load(source / "deep", 8)


def test_pictures_that_explain_left_in_a_folder_are_no_photos(source):
    (source / "deep" / "hund.explained.png").write_bytes((source / "hund.jpg").read_bytes())
    assert source / "hund.jpg" in caption.find([source]) and source / "deep" / "hund.explained.png" not in caption.find([source])
    assert caption.find([source / "deep" / "hund.explained.png"]) == [source / "deep" / "hund.explained.png"]


@pytest.mark.parametrize("name", ["https://example.com/a.jpg", "http://example.com/a.jpg?" + 300 * "x", "-"])
def test_what_is_no_file_is_to_be_downloaded_first(name, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"{re.escape(name)} is no file, as photos must be; download it first and name the file"):
        caption.find([Path(name)])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").write_bytes(b"a photo")
    assert caption.find([Path("-")]) == [Path("-")]


@pytest.mark.parametrize("name, text, message", [
    ("c.csv", "", "is empty"),
    ("c.csv", "image,caption\n", "holds no caption"),
    ("c.csv", "image,caption\nhund.jpg,\ncafé.webp,   \n", "names 2 photos but holds no caption"),
    ("c.csv", "file,words\nhund.jpg,a dog\n", "must name the columns image, caption.*'file,words'"),
    ("c.csv", "image,caption,caption\nhund.jpg,a dog,a hound\n", "names the column caption 2 times"),
    ("c.csv", "image,caption\nhund.jpg,a dog, running\n", "line 2 of .* has 3 cells where the first line has 2"),
    ("c.csv", "image,caption\n,a dog\n", "a caption without an image name: 'a dog'"),
    ("c.csv", "image,caption\nnone.jpg,a dog\n", "none of the 1 photos .* the first is none.jpg: has captions but"),
    ("c.csv", "image,caption,split\nhund.jpg,a dog,train\nhund.jpg,a dog,val\n", "puts hund.jpg into two splits"),
    ("c.csv", "image,caption,split\nhund.jpg,a dog,train\ncat.jpg,a cat,\n", "others, such as cat.jpg, none"),
    ("c.csv", "image,caption,split\nhund.jpg,a dog,../x\n", "cannot be the name of a split"),
    ("c.csv", f"image,caption,split\nhund.jpg,a dog,{'x' * 65}\n", "cannot be the name of a split"),
    ("c.csv", "image,caption\nhund.jpg,Stra\xdfe\n".encode("latin-1"), "is not UTF-8"),
    ("c.jsonl", '{"image": "hund.jpg", "caption": "a dog"}\n{"image": \n', "line 2 of .* is not JSON"),
    ("c.jsonl", '{"image": "hund.jpg"}\n', 'line 1 of .* is not {"image"'),
    ("c.jsonl", '{"image": "hund.jpg", "captions": "a dog"}\n', "line 1 of .* has no proper 'captions'"),
    ("c.jsonl", '{"image": "hund.jpg", "captions": [1]}\n', "a caption must be text"),
    ("c.jsonl", '{"image": "/", "caption": "a dog"}\n', "the first is /: has captions but no photo"),
    ("c.jsonl", '{"image": ".", "caption": "a dog"}\n', "the first is .: has captions but no photo"),
    ("c.jsonl", "[" * 200_000, "line 1 of .* is not JSON"),
    ("c.json", '{"images": [', "is not JSON"),
    ("c.json", "[" * 100_000, "is not JSON"),
    ("c.json", '[{"image": "hund.jpg", "caption": "a dog \\ud83d"}]', "half a character, .* of 'hund.jpg'; write the whole one"),
    ("c.json", '{"images": [{"id": 1, "file_name": "hund.jpg"}, {"id": 1, "file_name": "cat.jpg"}], "annotations": []}',
     "image 1 of .* has the id 1 of another one, hund.jpg"),
    ("c.json", '{"images": []}', "is neither"),
    ("c.json", '{"images": [{"id": 1, "file_name": "hund.jpg"}]}', "has images but neither annotations"),
    ("c.json", '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "image 1, which is not among"),
    ("c.json", '{"images": [{"id": 1, "file_name": "hund.jpg"}], "annotations": []}', "holds no caption"),
    ("c.json", '{"images": [{"filename": "hund.jpg", "sentences": [], "split": "train"}]}', "holds no caption"),
    ("c.json", '{"images": [{"filename": "hund.jpg", "sentences": [{}], "split": "train"}]}', "image 0 .* 'raw'"),
    *[("c.json", json.dumps({"images": [{"filename": "hund.jpg", "sentences": [{"raw": "a dog"}], "split": "train", key: value}]}),
       f"image 0 of .* has no proper '{key}'")
      for key, value in (("filepath", 5), ("filepath", None), ("cocoid", None), ("cocoid", 1.5), ("cocoid", True))],
    ("c.json", "[1, 2]", "item 0 of"),
    ("c.docx", "hello", "must end in .json"),
])
def test_bad_caption_files_are_explained(name, text, message, source, tmp_path):
    with pytest.raises(UserError, match=message):
        folder.plan(source, written(tmp_path, name, text))


def test_a_missing_caption_file_or_directory(source, tmp_path):
    with pytest.raises(UserError, match="there is no caption file"):
        folder.plan(source, tmp_path / "absent.csv")
    with pytest.raises(UserError, match="cannot be read"):
        captions.read(_directory(tmp_path))
    with pytest.raises(UserError, match="--source .* does not exist"):
        folder.plan(tmp_path / "absent", written(tmp_path, "c.csv", as_csv()))


def _directory(tmp_path):
    (tmp_path / "d.csv").mkdir()
    return tmp_path / "d.csv"


def test_impossible_shares_and_labels(source, tmp_path):
    file = written(tmp_path, "c.csv", as_csv(with_split=False))
    for shares in ((1.0, 0.0), (0.6, 0.4), (-0.1, 0.1)):
        with pytest.raises(UserError, match="must leave a part for training"):
            folder.plan(source, file, *shares)
    for label in ("", "../up", "a/b", "-x", "a b"):
        with pytest.raises(UserError, match="--label"):
            folder.check_label(label)
    assert folder.check_label("Möbel_2-b") == "Möbel_2-b"

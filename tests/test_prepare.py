"""The prepare command from beginning to end: what it writes, resumes, leaves out and refuses."""

import dataclasses
import errno
import os
import resource
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxcap import config, locks, prepare
from jaxcap.data import photos, places, records, staging
from jaxcap.errors import UserError

COUNT = {"train": 40, "dev": 8}
_PAGES = [page for page in sorted((Path(__file__).parents[1] / "configs").glob("*.py")) if page.stem != "shapes"]  # which is drawn


@pytest.fixture
def source(tmp_path):
    """A small Flickr8k without a test split."""
    root = tmp_path / "source"
    (root / "Flicker8k_Dataset").mkdir(parents=True)
    (root / "Flickr8k_text").mkdir()
    rng = np.random.default_rng(0)
    tokens, number = [], 0
    for split, count in COUNT.items():
        names = [f"photo_{number + i:03d}.jpg" for i in range(count)]
        number += count
        for name in names:
            cv2.imwrite(str(root / "Flicker8k_Dataset" / name), rng.integers(0, 255, (20, 30, 3), np.uint8))
            tokens += [f"{name}#0\tEin Hund läuft .\n", f"{name}#1\ta dog in {name} .\n"]
        (root / "Flickr8k_text" / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names) + "\n")
    (root / "Flickr8k_text" / "Flickr8k.token.txt").write_text("".join(tokens), "utf-8")
    return root


@pytest.fixture
def data(tmp_path):
    return config.Data(name="flickr8k", size=16, dir=str(tmp_path / "data"))


def run(source, data, *more):
    return prepare.main(["flickr8k", "--source", str(source), "--size", str(data.size), "--data-dir", data.dir, *more])


def damage(source, number, content=b""):
    (source / "Flicker8k_Dataset" / f"photo_{number:03d}.jpg").write_bytes(content)


def expected(source, name):
    return photos.resize(photos.decode(source / "Flicker8k_Dataset" / name), 16)


def leftovers(data):
    """Everything that lies in the data directory besides prepared data sets."""
    path = places.prepared_path(data)
    return [file for file in path.parent.glob("*") if file != path]


def test_records_hold_what_the_source_holds(source, data, capsys):
    assert run(source, data) == 0
    assert "train: 40 photos, 80 captions" in capsys.readouterr().out
    assert records.splits(data) == ["train", "val"]
    split = records.open_split(data, "val")
    assert split.image_ids == [f"photo_{i:03d}.jpg" for i in range(40, 48)]
    assert split.captions[0] == ["Ein Hund läuft .", "a dog in photo_040.jpg ."]
    for i, name in enumerate(split.image_ids):
        np.testing.assert_array_equal(split.image(i), expected(source, name))
    np.testing.assert_array_equal(split.images([5, 0, 5]), np.stack([split.image(i) for i in (5, 0, 5)]))
    assert split.images([]).shape == (0, 16, 16, 3)
    assert leftovers(data) == []


def test_tfds_reads_the_records_by_itself(source, data):
    run(source, data)
    builder = tfds.builder_from_directory(places.prepared_path(data))
    assert (builder.info.name, builder.info.splits["train"].num_examples) == ("flickr8k", 40)
    example = builder.as_data_source("train")[3]
    assert example["image"].shape == (16, 16, 3) and example["image_id"] == b"photo_003.jpg"
    assert [caption.decode() for caption in example["captions"]] == ["Ein Hund läuft .", "a dog in photo_003.jpg ."]


def test_joined_splits_and_fingerprints(source, data, tmp_path):
    run(source, data)
    train, val = (records.open_split(data, name) for name in ("train", "val"))
    both = records.open_split(data, "val+train")
    assert both.image_ids == val.image_ids + train.image_ids
    np.testing.assert_array_equal(both.image(7), val.image(7))
    np.testing.assert_array_equal(both.image(8), train.image(0))
    assert len({train.fingerprint, val.fingerprint, both.fingerprint}) == 3

    elsewhere = config.Data(name="flickr8k", size=16, dir=str(tmp_path / "again"))
    run(source, elsewhere)
    assert records.open_split(elsewhere, "train").fingerprint == train.fingerprint
    damage(source, 41, (source / "Flicker8k_Dataset" / "photo_000.jpg").read_bytes())
    run(source, elsewhere, "--force")
    assert records.open_split(elsewhere, "train").fingerprint == train.fingerprint
    assert records.open_split(elsewhere, "val").fingerprint != val.fingerprint


def test_many_files_keep_the_order(source, data, monkeypatch):
    monkeypatch.setattr(records, "_SHARD_BYTES", 7 * 16 * 16 * 3)
    run(source, data)
    split = records.open_split(data, "train")
    assert len(list(places.prepared_path(data).glob("*train.array_record*"))) == 6
    for i in (0, 6, 7, 39):
        np.testing.assert_array_equal(split.image(i), expected(source, split.image_ids[i]))


def test_bad_photos_are_left_out_by_name(source, data, capsys):
    damage(source, 3)
    damage(source, 17, b"this is a text file\n")
    whole = (source / "Flicker8k_Dataset" / "photo_020.jpg").read_bytes()
    damage(source, 20, whole[: len(whole) // 2])
    (source / "Flicker8k_Dataset" / "photo_044.jpg").unlink()
    assert run(source, data) == 0
    out = capsys.readouterr().out
    for name, reason in {"003": "it is empty", "017": "it is not a photo", "020": "it is damaged",
                         "044": "has captions but no photo"}.items():
        assert f"left out  photo_{name}.jpg: {reason}" in out
    skipped = (places.prepared_path(data) / "skipped.txt").read_text().splitlines()
    assert len(skipped) == 4
    split = records.open_split(data, "train")
    assert len(split) == 37 and not {"photo_003.jpg", "photo_017.jpg", "photo_020.jpg"} & set(split.image_ids)
    for i in (2, 3, 36):  # captions stay with their photos behind a gap
        assert split.image_ids[i] in split.captions[i][1]
        np.testing.assert_array_equal(split.image(i), expected(source, split.image_ids[i]))


def test_a_split_of_damaged_photos_is_not_offered(source, data):
    for number in range(40, 48):
        damage(source, number)
    run(source, data)
    assert records.splits(data) == ["train"]
    with pytest.raises(UserError, match="no split 'val'; it offers train: set data.val=train .evaluate: --split train.$"):
        records.open_split(data, "val")


def test_nothing_but_damaged_photos_is_an_error(source, data):
    for number in range(48):
        damage(source, number)
    with pytest.raises(UserError, match="none of the 48 photos can be read; the first is photo_000.jpg: it is empty"):
        run(source, data)
    assert not places.prepared_path(data).parents[1].exists()  # and no stage, for there is nothing to go on from


def test_a_finished_data_set_is_left_alone_unless_forced(source, data, capsys, monkeypatch):
    run(source, data)
    loads = count_loads(monkeypatch)
    capsys.readouterr()
    assert run(source, data) == 0
    assert "already prepared" in capsys.readouterr().out and loads == []
    assert run(source, data, "--force") == 0
    assert len(loads) == 48


def test_a_failing_force_keeps_the_old_one(source, data, monkeypatch):
    run(source, data)
    before = records.open_split(data, "train").fingerprint
    for number in range(48):
        damage(source, number)
    with pytest.raises(UserError, match="none of the 48"):
        run(source, data, "--force")
    assert records.open_split(data, "train").fingerprint == before


def test_force_keeps_the_old_one_until_the_new_one_is_whole(source, data, monkeypatch):
    run(source, data)
    before, seen, call = records.open_split(data, "train").fingerprint, [], records._Shard.__call__
    damage(source, 3)

    def reading(self):
        seen.append(records.open_split(data, "train").fingerprint)
        return call(self)

    monkeypatch.setattr(records._Shard, "__call__", reading)
    assert run(source, data, "--force") == 0
    assert seen == [before] * 2 and len(records.open_split(data, "train")) == 39 and leftovers(data) == []


def test_a_second_force_is_refused_and_the_first_one_replaces(source, data, monkeypatch):
    run(source, data)
    damage(source, 3)
    call = records._Shard.__call__

    def twice(self):
        with pytest.raises(UserError, match="another process is preparing"):
            run(source, data, "--force")
        return call(self)

    monkeypatch.setattr(records._Shard, "__call__", twice)
    assert run(source, data, "--force") == 0
    assert len(records.open_split(data, "train")) == 39 and leftovers(data) == []


def test_force_mends_a_damaged_description(source, data):
    run(source, data)
    (places.prepared_path(data) / "dataset_info.json").write_text("{")
    assert run(source, data, "--force") == 0
    assert len(records.open_split(data, "train").images([0])) == 1


@pytest.mark.parametrize("moved", ["1.0.0", "1.0.0.replaced"])
def test_a_force_that_cannot_rename_says_so_and_keeps_the_old_one(source, data, monkeypatch, moved):
    run(source, data)
    damage(source, 3)
    path, rename = places.prepared_path(data), Path.rename

    def failing(self, target):
        if target == path.with_name(moved) and not self.name.endswith(".replaced"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot write to .*/1.0.0: Permission denied; name another directory with --data-dir, or data.dir in"):
        patch.setattr(Path, "rename", failing)
        run(source, data, "--force")
    assert len(records.open_split(data, "train")) == 40 and [file.name for file in leftovers(data)] == ["1.0.0.staging"]


@pytest.mark.parametrize("staged", [False, True])
def test_a_replacement_that_was_cut_short_is_put_back(source, data, capsys, staged):
    run(source, data)
    path = places.prepared_path(data)
    aside, stage = path.with_name("1.0.0.replaced"), path.with_name("1.0.0.staging")
    if staged:
        stage.mkdir()
    path.rename(aside)
    assert len(records.open_split(data, "train")) == 40
    path.rename(aside)
    capsys.readouterr()
    assert run(source, data) == 0 and "already prepared" in capsys.readouterr().out
    path.rename(aside)
    assert run(source, data, "--force") == 0 and leftovers(data) == []


def test_who_prepares_is_not_disturbed_between_two_renames(source, data):
    run(source, data)
    path = places.prepared_path(data)
    stage = path.with_name("1.0.0.staging")
    stage.mkdir()
    path.rename(path.with_name("1.0.0.replaced"))
    with open(stage / "lock", "w") as lock, pytest.raises(UserError, match="not prepared"):
        locks.hold(lock, "none")
        records.open_split(data, "train")
    assert len(records.open_split(data, "train")) == 40


def count_loads(monkeypatch, interrupt_at=None):
    """Counts the photos decoded from now on; one of them may interrupt the command, as Ctrl-C would."""
    loads, lock, load = [], threading.Lock(), photos.load

    def counting(photo, size):
        with lock:
            loads.append(photo)
            if len(loads) == interrupt_at:
                raise KeyboardInterrupt
        return load(photo, size)

    monkeypatch.setattr(photos, "load", counting)
    return loads


@pytest.mark.parametrize("workers", ["1", "3"])
def test_an_interrupted_run_resumes_where_it_was(source, data, monkeypatch, workers):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_loads(patch, interrupt_at=30)
        run(source, data, "--workers", workers)
    assert not places.prepared_path(data).exists()
    loads = count_loads(monkeypatch)
    assert run(source, data, "--workers", workers) == 0
    assert len(loads) <= 48 - 29 + int(workers)  # what was at work then is done again
    split = records.open_split(data, "train+val")
    assert len(split) == 48
    for i in (0, 12, 28, 29, 30, 47):
        np.testing.assert_array_equal(split.image(i), expected(source, split.image_ids[i]))
    assert leftovers(data) == []


def test_an_interruption_while_writing_costs_no_decoding(source, data, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records._Shard, "__call__", interrupt)
        run(source, data)
    assert not places.prepared_path(data).exists()
    loads = count_loads(monkeypatch)
    run(source, data)
    assert loads == [] and len(records.open_split(data, "train")) == 40


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_killed_run_loses_only_what_the_journal_lacks(source, data, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records._Shard, "__call__", interrupt)
        run(source, data)
    stage = places.prepared_path(data).with_name("1.0.0.staging")
    journal = (stage / "journal").read_text()
    (stage / "journal").write_text("".join(journal.splitlines(True)[:10]) + "4")  # cut off inside a line
    (stage.parent / "incomplete.ABC123_1.0.0").mkdir()  # TFDS's, when it is killed
    loads = count_loads(monkeypatch)
    run(source, data)
    assert len(loads) == 38 and leftovers(data) == []


def test_other_photos_do_not_resume_the_old_ones(source, data, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_loads(patch, interrupt_at=30)
        run(source, data)
    listing = source / "Flickr8k_text" / "Flickr_8k.trainImages.txt"
    listing.write_text("\n".join(reversed(listing.read_text().split())))
    run(source, data)
    split = records.open_split(data, "train")
    assert split.image_ids[0] == "photo_039.jpg"
    np.testing.assert_array_equal(split.image(0), expected(source, "photo_039.jpg"))


def test_a_photo_mended_in_between_is_read(source, data, monkeypatch):
    good = (source / "Flicker8k_Dataset" / "photo_003.jpg").read_bytes()
    damage(source, 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records._Shard, "__call__", interrupt)
        run(source, data)
    damage(source, 3, good)
    run(source, data)
    assert len(records.open_split(data, "train")) == 40


def test_a_photo_replaced_in_between_is_read_anew(source, data, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records._Shard, "__call__", interrupt)
        run(source, data)
    photos_of = source / "Flicker8k_Dataset"
    (photos_of / "photo_003.jpg").write_bytes((photos_of / "photo_004.jpg").read_bytes())
    run(source, data)
    split = records.open_split(data, "train")
    np.testing.assert_array_equal(split.image(split.image_ids.index("photo_003.jpg")), expected(source, "photo_004.jpg"))


def test_a_full_disk_while_decoding_keeps_what_is_done(source, data, monkeypatch):
    calls, pwrite = [], os.pwrite

    def full(*arguments):
        calls.append(1)
        if len(calls) > 25:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device; free the disk or name another directory"):
        patch.setattr(os, "pwrite", full)
        run(source, data)
    assert not places.prepared_path(data).exists()
    loads = count_loads(monkeypatch)
    run(source, data)
    assert len(loads) == 48 - 25


def test_a_full_disk_while_writing_records_leaves_no_half_data_set(source, data, monkeypatch):
    call = records._Shard.__call__

    def limited(self):  # from here on no file may grow beyond this: a real failure inside ArrayRecord
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        return call(self)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot write to .*/16/1.0.0: .*; free"):
        patch.setattr(records._Shard, "__call__", limited)
        try:
            run(source, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in leftovers(data)] == ["1.0.0.staging"] and not places.prepared_path(data).exists()
    run(source, data)
    assert len(records.open_split(data, "train")) == 40


def test_too_little_space_is_said_before_anything_is_decoded(source, data, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    loads = count_loads(monkeypatch)
    with pytest.raises(UserError, match="needs 0 MB while it runs, and 0 MB are free"):
        run(source, data)
    assert loads == [] and not places.prepared_path(data).parents[1].exists()


def test_a_place_that_cannot_be_written(source, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file/data"):
        run(source, config.Data(name="flickr8k", size=16, dir=str(tmp_path / "file" / "data")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written(source, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(UserError, match="cannot write to .*Permission denied"):
        run(source, config.Data(name="flickr8k", size=16, dir=str(tmp_path / "locked")))


def test_two_at_once_are_refused(source, data):
    stage = places.prepared_path(data).with_name("1.0.0.staging")
    stage.mkdir(parents=True)
    with open(stage / "lock", "w") as lock, pytest.raises(UserError, match="another process is preparing"):
        locks.hold(lock, "none")
        run(source, data)
    assert run(source, data) == 0


@pytest.mark.parametrize("arguments, message", [
    (["--size", "0"], "--size must be at least 1"),
    (["--size", "16", "--workers", "-1"], "--workers must not be negative"),
])
def test_impossible_options(source, data, arguments, message):
    with pytest.raises(UserError, match=message):
        prepare.main(["flickr8k", "--source", str(source), "--data-dir", data.dir, *arguments])


def test_a_place_that_is_no_text(source, tmp_path):
    with pytest.raises(UserError, match="--data-dir .* is not UTF-8"):
        prepare.main(["flickr8k", "--source", str(source), "--size", "16", "--data-dir", str(tmp_path / "b\udcffd")])


def test_a_missing_source(tmp_path, data):
    with pytest.raises(UserError, match="--source .*absent does not exist"):
        run(tmp_path / "absent", data)
    assert not (tmp_path / "data").exists()


def test_what_is_not_prepared_says_how_to(data):
    with pytest.raises(UserError, match="not prepared at size 16 in .*run: python -m jaxcap.prepare flickr8k "
                                        "--source DIR --size 16 --data-dir"):
        records.open_split(data, "train")
    with pytest.raises(UserError, match="prepare folder --source DIR --captions FILE --label cats --size 64"):
        records.splits(config.Data(name="folder", label="cats", dir=data.dir))
    with pytest.raises(UserError, match="data.name=folder needs data.label=NAME"):
        records.splits(config.Data(name="folder", dir=data.dir))
    with pytest.raises(UserError, match="prepares a data set coco-2017: with data.name=coco, data.label must be '' or 'im2txt', not '2017'"):
        records.splits(config.Data(name="coco", label="2017", dir=data.dir))


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.stem)
def test_the_suggested_command_prepares_what_a_shipped_page_lacks(page, tmp_path):
    where = tmp_path / "all my data"
    wanted = config.load(str(page), ["start=runs/one", f"data.dir={where}"]).data
    with pytest.raises(UserError) as error:
        records.open_split(wanted, wanted.train)
    command = shlex.split(str(error.value).partition("python -m jaxcap.prepare ")[2])
    options = prepare._parser().parse_args(command)
    assert prepare._data(options) == config.Data(name=wanted.name, label=wanted.label, size=wanted.size, dir=str(where))


def test_splits_that_do_not_exist(source, data):
    run(source, data)
    with pytest.raises(UserError, match="no split 'test'; it offers train, val: name one of these .evaluate: --split train.$"):
        records.open_split(data, "train+test")
    with pytest.raises(UserError, match="no split 'test'; it offers train, val: set data.train=train$"):
        records.open_split(dataclasses.replace(data, train="train+test"), "train+test")
    with pytest.raises(UserError, match="same split twice"):
        records.open_split(data, "train+train")


def test_a_data_set_without_any_index_is_damaged(source, data):
    run(source, data)
    for index in places.prepared_path(data).glob("*.index.json"):
        index.unlink()
    with pytest.raises(UserError, match="is damaged .it has no ..index.json.; run its prepare command again with --force"):
        records.open_split(data, "train")


def test_a_damaged_index_or_description_is_said(source, data):
    run(source, data)
    for name, text in [("dataset_info.json", ""), ("dataset_info.json", '{"name": "x", "nme": 3}'), ("features.json", "3"), ("features.json", None),
                       ("val.index.json", '{"image_ids": ['), ("val.index.json", "{}"), ("val.index.json", "3"), ("val.index.json", "[" * 200_000),
                       ("val.index.json", '{"image_ids": ["a"], "captions": [], "extra": {}, "fingerprint": "f"}')]:
        path = places.prepared_path(data) / name
        whole = path.read_text()
        path.write_text(text) if text is not None else path.unlink()
        with pytest.raises(UserError, match="is damaged .* run its prepare command again with --force") as error:
            records.open_split(data, "val").images([0])
        assert "\n" not in str(error.value)
        path.write_text(whole)
    assert len(records.open_split(data, "val").images([0])) == 1


def test_records_that_were_cut_are_said(source, data):
    run(source, data)
    file = next(places.prepared_path(data).glob("*-val.array_record*"))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match="is damaged .* run its prepare command again with --force"):
        records.open_split(data, "val").image(0)


def test_from_the_command_line(source, data, tmp_path):
    command = [sys.executable, "-m", "jaxcap.prepare", "flickr8k", "--size", "16", "--data-dir", data.dir]
    bad = subprocess.run([*command, "--source", str(source / "absent")], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr == f"error: --source {source / 'absent'} does not exist\n"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    good = subprocess.run([*command, "--source", str(source)], capture_output=True, text=True,
                          env={**os.environ, "TMPDIR": str(temporary)})
    assert good.returncode == 0 and "prepared  train 40, val 8 photos" in good.stdout
    assert os.listdir(temporary) == []


def test_where_data_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXCAP_DATA", str(tmp_path / "env"))
    assert records.data_dir(config.Data()) == tmp_path / "env"
    assert records.data_dir(config.Data(dir=str(tmp_path / "own"))) == tmp_path / "own"
    monkeypatch.delenv("JAXCAP_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.data_dir(config.Data()) == tmp_path / ".cache" / "jaxcap" / "data"

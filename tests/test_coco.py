"""COCO in the official layout, as archives, unpacked, downloaded, or as TFDS has it; small ones that the tests make."""

import functools
import hashlib
import http.server
import json
import os
import threading
import zipfile

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxcap import config, download, prepare
from jaxcap.data import coco, records
from jaxcap.errors import UserError

TRAIN = [f"COCO_train2014_{i:012d}.jpg" for i in (9, 25, 30)]
VAL = [f"COCO_val2014_{i:012d}.jpg" for i in range(100, 120)]
KARPATHY = dict(zip(TRAIN, ["train"] * 3, strict=True)) | dict(zip(VAL, ["restval"] * 12 + ["val"] * 5 + ["test"] * 3, strict=True))


def number(name):
    return int(name[-16:-4])


def texts(name):
    return [f"A photo of {number(name)}.", " Two\nof it "]


def jpeg(name) -> bytes:
    return cv2.imencode(".jpg", np.full((12, 16, 3), number(name), np.uint8))[1].tobytes()


def karpathy_json():
    return json.dumps({"dataset": "coco", "images": [
        {"filename": name, "filepath": name.split("_")[1], "cocoid": number(name), "split": split,
         "sentences": [{"raw": text, "tokens": [], "sentid": 0} for text in texts(name)]}
        for name, split in KARPATHY.items()]})


def annotation_json(names):
    images = [{"id": number(name), "file_name": name, "height": 12, "width": 16} for name in names]
    annotations = [{"image_id": number(name), "id": 0, "caption": text} for k in (0, 1) for name in names
                   for text in texts(name)[k:k + 1]]
    return json.dumps({"info": {}, "images": images, "annotations": annotations})


def write_archives(root):
    """The four official archives, with 23 tiny photos."""
    root.mkdir(exist_ok=True)
    for part, names in (("train2014", TRAIN), ("val2014", VAL)):
        with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
            archive.writestr(f"{part}/", "")
            for name in names:
                archive.writestr(f"{part}/{name}", jpeg(name))
    with zipfile.ZipFile(root / "annotations_trainval2014.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations/captions_train2014.json", annotation_json(TRAIN))
        archive.writestr("annotations/captions_val2014.json", annotation_json(VAL))
        archive.writestr("annotations/instances_val2014.json", "{}")
    with zipfile.ZipFile(root / "caption_datasets.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset_coco.json", karpathy_json())
        archive.writestr("dataset_flickr8k.json", "{}")
    return root


@pytest.fixture
def archives(tmp_path):
    return write_archives(tmp_path / "coco")


def unpack(archives):
    for path in archives.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(archives)
        path.unlink()
    return archives


def names(plan):
    return {split: [photo.image_id for photo in photos] for split, photos in plan.splits.items()}


def ids(names):
    return [str(number(name)) for name in names]


@pytest.mark.parametrize("layout", [lambda root: root, unpack])
def test_karpathys_splits(archives, layout):
    plan = coco.plan(layout(archives))
    assert names(plan) == {"train": ids(TRAIN), "restval": ids(VAL[:12]), "val": ids(VAL[12:17]), "test": ids(VAL[17:])}
    assert plan.problems == ()
    photo = plan.splits["val"][0]
    assert photo.source.read() == jpeg(VAL[12]) and photo.captions == ("A photo of 112.", "Two of it")


@pytest.mark.parametrize("layout", [lambda root: root, unpack])
def test_im2txts_splits(archives, layout):
    plan = coco.plan(layout(archives), "im2txt")
    assert names(plan) == {"train": ids(TRAIN + VAL[:17]), "val": ids(VAL[17:18]), "test": ids(VAL[18:])}
    assert all(photo.captions[1] == "Two of it" for photos in plan.splits.values() for photo in photos)


def test_the_whole_way_from_zips(archives, tmp_path, capsys):
    arguments = ["coco", "--source", str(archives), "--size", "8", "--data-dir", str(tmp_path / "data")]
    assert prepare.main(arguments) == 0
    assert prepare.main([*arguments, "--splits", "im2txt"]) == 0
    data = config.Data(name="coco", size=8, dir=str(tmp_path / "data"))
    assert records.splits(data) == ["train", "restval", "val", "test"]
    split = records.open_split(data, "train+restval")
    assert split.image_ids == ids(TRAIN + VAL[:12])
    assert [int(split.image(i)[4, 4, 1]) for i in (0, 2, 3, 14)] == [9, 30, 100, 111]
    other = config.Data(name="coco", label="im2txt", size=8, dir=str(tmp_path / "data"))
    assert len(records.open_split(other, "train")) == 20


def test_damaged_members_are_left_out_by_name(archives, tmp_path, capsys):
    path = archives / "val2014.zip"
    data = bytearray(path.read_bytes())
    at = data.index(jpeg(VAL[3])) + 100
    data[at] ^= 255  # the archive's own checksum finds it, whatever a JPEG decoder would
    path.write_bytes(data)
    prepare.main(["coco", "--source", str(archives), "--size", "8", "--data-dir", str(tmp_path / "data")])
    assert "left out  103: it cannot be read (Bad CRC-32" in capsys.readouterr().out
    assert len(records.open_split(config.Data(name="coco", size=8, dir=str(tmp_path / "data")), "restval")) == 11


def test_parts_that_are_not_there_are_not_offered(archives):
    (archives / "train2014.zip").unlink()
    plan = coco.plan(archives)
    assert list(plan.splits) == ["restval", "val", "test"]
    assert len(plan.problems) == 1 and plan.problems[0].startswith("train2014: neither train2014.zip nor the directory")
    (archives / "val2014.zip").unlink()
    with pytest.raises(UserError, match="holds none of COCO's photos: put train2014.zip"):
        coco.plan(archives)


def test_single_photos_that_are_not_there_are_named(archives):
    unpack(archives)
    (archives / "val2014" / VAL[0]).unlink()
    assert coco.plan(archives).problems == (f"{VAL[0]}: has captions but no photo",)


def test_missing_and_damaged_parts_are_explained(archives, tmp_path):
    with pytest.raises(UserError, match="--source .* does not exist"):
        coco.plan(tmp_path / "absent")
    (archives / "val2014.zip").write_bytes((archives / "val2014.zip").read_bytes()[:2000])
    with pytest.raises(UserError, match="val2014.zip cannot be read .*may be incomplete"):
        coco.plan(archives)
    (archives / "caption_datasets.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="caption_datasets.zip cannot be read"):
        coco.plan(archives)
    (archives / "caption_datasets.zip").unlink()
    with pytest.raises(UserError, match="Karpathy's splits need dataset_coco.json .* --download .*--splits im2txt"):
        coco.plan(archives)
    image = {"filename": "a.jpg", "split": "train", "sentences": []}
    (archives / "dataset_coco.json").write_text(json.dumps({"images": [image]}))
    with pytest.raises(UserError, match="not Karpathy's file for COCO"):
        coco.plan(archives)
    (archives / "annotations_trainval2014.zip").unlink()
    with pytest.raises(UserError, match="im2txt's splits need annotations_trainval2014.zip"):
        coco.plan(archives, "im2txt")


# --- downloaded --------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The archives on a server of this machine, in the place of the official ones."""
    root = write_archives(tmp_path / "server")
    monkeypatch.setattr(download, "_PAUSE_S", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    remotes = {}
    for part, remote in coco._REMOTES.items():
        content = (root / remote.name).read_bytes()
        remotes[part] = download.Remote(f"http://127.0.0.1:{server.server_port}/{remote.name}", len(content),
                                        hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(coco, "_REMOTES", remotes)
    yield requests
    server.shutdown()
    server.server_close()


def test_downloaded_and_prepared_in_one_command(published, tmp_path):
    arguments = ["coco", "--source", str(tmp_path / "new"), "--size", "8", "--data-dir", str(tmp_path / "data")]
    assert prepare.main([*arguments, "--download"]) == 0
    assert published == ["/caption_datasets.zip", "/val2014.zip", "/train2014.zip"]
    assert sorted(os.listdir(tmp_path / "new")) == ["caption_datasets.zip", "train2014.zip", "val2014.zip"]
    data = config.Data(name="coco", size=8, dir=str(tmp_path / "data"))
    assert len(records.open_split(data, "train+restval+val+test")) == 23


def test_what_is_there_is_not_downloaded(published, archives):
    unpack(archives)
    coco.plan(archives, "karpathy", fetch=True)
    coco.plan(archives, "im2txt", fetch=True)
    assert published == []


def test_a_wrong_checksum_stops(published, tmp_path, monkeypatch):
    wrong = download.Remote(coco._REMOTES["karpathy"].url, coco._REMOTES["karpathy"].size, "f" * 64)
    monkeypatch.setitem(coco._REMOTES, "karpathy", wrong)
    with pytest.raises(UserError, match="is not the published file"):
        coco.plan(tmp_path / "new", fetch=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_the_official_checksums_are_those_that_tfds_publishes():
    published = {}
    for name in ("coco_captions", "coco2014"):
        for line in (tfds.core.tfds_path("url_checksums") / f"{name}.txt").read_text().splitlines():
            url, size, sha256 = line.split("\t")[:3]
            published[url] = (int(size), sha256)
    for remote in coco._REMOTES.values():
        assert published[remote.url] == (remote.size, remote.sha256)


# --- as TFDS has it ----------------------------------------------------------------------------------------------


class CocoCaptions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes records with the features of TFDS's coco_captions 1.1.0."""

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014", version="1.1.0")]

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence({"id": np.int64, "bbox": tfds.features.BBoxFeature()}),
            "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
        }))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "restval", "val", "test")}

    def _generate_examples(self, split):
        for name in [name for name, where in KARPATHY.items() if where == split]:
            yield number(name), {
                "image": jpeg(name), "image/filename": name, "image/id": number(name), "objects": [],
                "captions": [{"text": text, "id": k} for k, text in enumerate(texts(name))]}


@pytest.fixture
def tfds_dir(tmp_path):
    builder = CocoCaptions(data_dir=str(tmp_path / "tensorflow_datasets"))
    builder.download_and_prepare(file_format="array_record", download_dir=str(tmp_path / "unused"))
    return tmp_path / "tensorflow_datasets"


def test_tfds_coco_captions_is_read(tfds_dir, archives, tmp_path):
    plan = coco.plan(tfds_dir)
    assert {split: sorted(photos) for split, photos in names(plan).items()} == {
        split: sorted(photos) for split, photos in names(coco.plan(archives)).items()}
    by_id = {photo.image_id: photo for photo in plan.splits["val"]}
    assert by_id["112"].captions == ("A photo of 112.", "Two of it") and by_id["112"].source.read() == jpeg(VAL[12])

    directory = tfds_dir / "coco_captions" / "2014" / "1.1.0"
    prepare.main(["coco", "--source", str(directory), "--size", "8", "--data-dir", str(tmp_path / "data")])
    split = records.open_split(config.Data(name="coco", size=8, dir=str(tmp_path / "data")), "train+restval")
    assert len(split) == 15 and all(int(split.image(i)[0, 0, 0]) == int(split.image_ids[i]) for i in range(15))


def test_tfds_records_for_tensorflow_are_refused(tfds_dir):
    info = tfds_dir / "coco_captions" / "2014" / "1.1.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="written as tfrecord, which needs TensorFlow .*convert_format"):
        coco.plan(tfds_dir)


def test_tfds_other_data_sets_are_refused(tmp_path, archives):
    prepare.main(["coco", "--source", str(archives), "--size", "8", "--data-dir", str(tmp_path / "data")])
    with pytest.raises(UserError, match="holds the TFDS data set coco, not coco_captions"):
        coco.plan(tmp_path / "data" / "coco" / "8" / "1.0.0")
    with pytest.raises(UserError, match="only Karpathy's splits"):
        coco.plan(tmp_path / "data" / "coco" / "8" / "1.0.0", "im2txt")

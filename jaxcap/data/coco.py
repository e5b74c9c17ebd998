"""COCO 2014 captions (Lin et al. 2014; Chen et al. 2015) from the official archives, as they are or unpacked.

Karpathy and Li's splits (CVPR 2015) are the default: train 82,783, restval 30,504, val 5,000, test 5,000 photos, and
papers train on train+restval. im2txt's are train2014 with the first 85 % of val2014, the next 5 %, the last 10 %, in
the order of the annotation file. Scores on the two do not compare.
"""

import os
import zipfile
from dataclasses import replace
from pathlib import Path

from jaxcap import download
from jaxcap.data import captions, coco_tfds
from jaxcap.data.staging import File, Photo, PhotoBuilder, Plan, Source, ZipMember, require_directory
from jaxcap.errors import UserError

# Sizes and SHA-256 as tensorflow-datasets 4.9.10 publishes them (url_checksums/coco_captions.txt and coco2014.txt).
_REMOTES = {
    "train2014": download.Remote(
        "http://images.cocodataset.org/zips/train2014.zip",
        13_510_573_713, "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775"),
    "val2014": download.Remote(
        "http://images.cocodataset.org/zips/val2014.zip",
        6_645_013_297, "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0"),
    "annotations": download.Remote(
        "http://images.cocodataset.org/annotations/annotations_trainval2014.zip",
        252_872_794, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"),
    "karpathy": download.Remote(
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        36_745_453, "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817"),
}
_NEEDED = {"karpathy": ("karpathy", "val2014", "train2014"), "im2txt": ("annotations", "val2014", "train2014")}
_SPLITS = ("train", "restval", "val", "test")


class Coco(PhotoBuilder, skip_registration=True):
    """The builder of `plan`'s photos; image ids are COCO's numbers."""


def plan(source: Path, splits: str = "karpathy", fetch: bool = False) -> Plan:
    """The photos and captions in `source`: the archives, unpacked or not, or TFDS's `coco_captions` in ArrayRecord.

    `splits` is "karpathy" or "im2txt"; what they need and `source` lacks is downloaded if `fetch` is true. A split
    whose photos are not there is not offered. Raises `UserError` if what is needed is missing or damaged.
    """
    if prepared := coco_tfds.find(source):
        if splits != "karpathy":
            raise UserError(f"{prepared} has only Karpathy's splits; --splits im2txt needs COCO's own archives")
        return coco_tfds.plan(prepared)
    if fetch:
        for part in _NEEDED[splits]:
            if _find(source, part) is None:
                download.fetch(_REMOTES[part], source)
    require_directory(source)
    entries = _karpathy(source) if splits == "karpathy" else _im2txt(source)
    archives = {part: _Archive(found, part) for part in ("train2014", "val2014") if (found := _find(source, part))}
    problems = [f"{part}: neither {part}.zip nor the directory {part} is in {source}; its photos are left out"
                for part in ("train2014", "val2014") if part not in archives]
    planned: dict[str, list[Photo]] = {split: [] for split in _SPLITS}
    for entry in entries:
        if entry.folder not in archives:
            continue
        photo = archives[entry.folder].photo(entry.name)
        if photo is None or not entry.captions:
            problems.append(f"{entry.name}: has {'no captions' if photo else 'captions but no photo'}")
        else:
            planned[entry.split].append(Photo(entry.image_id, entry.captions, photo))
    if not any(planned.values()):
        raise UserError(f"{source} holds none of COCO's photos: put train2014.zip and val2014.zip, or the directories "
                        "train2014 and val2014, there, or download them with --download")
    return Plan({split: photos for split, photos in planned.items() if photos}, tuple(problems))


def _karpathy(source: Path) -> list[captions.Entry]:
    """Photos with captions and splits from Karpathy's file, which holds all three."""
    found = _find(source, "karpathy")
    if found is None:
        raise UserError(f"Karpathy's splits need dataset_coco.json or {_REMOTES['karpathy'].name} in {source}; get it "
                        f"with --download or from {_REMOTES['karpathy'].url}, or use --splits im2txt")
    content = captions.read_json(found, member="dataset_coco.json")
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"{found} is not Karpathy's file: it has no list of images")
    entries = captions.karpathy(content, found)
    for entry in entries:
        if entry.split not in _SPLITS or not entry.image_id or entry.folder not in ("train2014", "val2014"):
            raise UserError(f"{found} is not Karpathy's file for COCO: {entry.name} has split {entry.split!r}, "
                            f"cocoid {entry.image_id!r}, filepath {entry.folder!r}")
    return entries


def _im2txt(source: Path) -> list[captions.Entry]:
    """Photos with captions from COCO's own files, and the splits that im2txt makes of them."""
    found = _find(source, "annotations")
    if found is None:
        raise UserError(f"im2txt's splits need {_REMOTES['annotations'].name}, or the captions_train2014.json and "
                        f"captions_val2014.json of it in annotations/, in {source}; get it with --download or from "
                        f"{_REMOTES['annotations'].url}")
    read = {}
    for part in ("train2014", "val2014"):
        file = f"captions_{part}.json"
        unpacked = found.is_dir()
        content = captions.read_json(found / file if unpacked else found, "" if unpacked else f"annotations/{file}")
        if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
            raise UserError(f"{file} in {found} is not COCO's: it has no list of annotations")
        read[part] = [replace(entry, folder=part) for entry in captions.coco(content, found)]
    train, val = read["train2014"], read["val2014"]
    first, second = int(0.85 * len(val)), int(0.90 * len(val))
    parts = {"train": train + val[:first], "val": val[first:second], "test": val[second:]}
    return [replace(entry, split=split) for split, entries in parts.items() for entry in entries]


class _Archive:
    """The photos of one part of COCO, in its zip or unpacked."""

    def __init__(self, found: Path, part: str):
        self._found = found
        self._part = part
        try:
            self._names = set(os.listdir(found) if found.is_dir() else zipfile.ZipFile(found).namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{found} cannot be read ({error}): it may be incomplete, download it again") from error

    def photo(self, name: str) -> Source | None:
        """Where the photo is, if it is there."""
        if self._found.is_dir():
            return File(self._found / name) if name in self._names else None
        member = f"{self._part}/{name}"
        return ZipMember(self._found, member) if member in self._names else None


def _find(source: Path, part: str) -> Path | None:
    """Where a part of COCO is: its archive, or the directory or file that it unpacks to."""
    names = {
        "karpathy": ("dataset_coco.json", "caption_datasets/dataset_coco.json", "caption_datasets.zip"),
        "annotations": ("annotations", "annotations_trainval2014.zip"),
    }.get(part, (part, f"images/{part}", f"{part}.zip", f"images/{part}.zip"))
    return next((source / name for name in names if (source / name).exists()), None)

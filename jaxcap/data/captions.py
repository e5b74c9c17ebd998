"""Caption files in the formats that people have them in: Karpathy JSON, COCO JSON, JSON Lines, CSV."""

import csv
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jaxcap.errors import UserError

_LONGEST_SPLIT = 64  # letters of a name, which becomes part of files' names
_TABLES = (".csv", ".tsv", ".txt")
_LINES = (".jsonl", ".ndjson")
_FIELDS = {  # of tables and objects, in any case; the first that is there is taken
    "image": ("image", "file_name", "filename", "image_name"),
    "caption": ("caption", "text", "comment", "caption_text"),
    "captions": ("captions",),
    "split": ("split",),
}
_SPLIT_NAMES = {"dev": "val", "valid": "val", "validation": "val", "training": "train", "testing": "test"}


@dataclass(frozen=True)
class Entry:
    """What a caption file says about one photo."""

    name: str  # the photo's file, as the caption file writes it
    captions: tuple[str, ...]  # white space made single blanks; may be empty
    split: str = ""  # "" where the file names none
    image_id: str = ""  # "" where the name is all there is
    folder: str = ""  # where the name may be relative to, below the photos' directory


def read(path: Path) -> list[Entry]:
    """The entries of a caption file, one a photo, in the order of the file; suffix and content tell the format.

    Raises `UserError` if it cannot be read, is none of the formats, or holds no photo with a caption.
    """
    text = _text(path)
    suffix = path.suffix.lower()
    if not text.strip():
        raise UserError(f"caption file {path} is empty")
    if suffix in _LINES:
        entries = _lines(text, path)
    elif suffix in _TABLES:
        entries = _table(text, path)
    elif suffix == ".json":
        entries = _json(_parsed(text, path), path)
    else:
        raise UserError(f"caption file {path} must end in .json (Karpathy or COCO), {', '.join(_LINES + _TABLES)}")
    merged = _merge(entries, path)
    if not any(entry.captions for entry in merged):
        raise UserError(f"caption file {path} names {len(merged)} photos but holds no caption")
    return merged


def digest(path: Path) -> str:
    """SHA-256 of a caption file. Raises `UserError` if it cannot be read."""
    return hashlib.sha256(_bytes(path)).hexdigest()


def read_json(path: Path, member: str = ""):
    """The content of a JSON file, or of that `member` where `path` is a zip. Raises `UserError` if it is no JSON."""
    if not member or path.suffix.lower() != ".zip":
        return _parsed(_text(path), path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _parsed(archive.read(member).decode("utf-8-sig"), path / member)
    except KeyError:
        raise UserError(f"{path} has no {member} in it") from None
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): it may be incomplete, download it again") from error


def karpathy(content: dict, path: Path) -> list[Entry]:
    """The entries of Karpathy's format: images[].{filename, filepath?, split, cocoid?, sentences[].raw}."""
    entries = []
    for number, image in enumerate(content["images"]):
        where = f"image {number} of {path}"
        sentences = [_field(sentence, "raw", where) for sentence in _field(image, "sentences", where, list)]
        entries.append(Entry(
            name=_field(image, "filename", where),
            captions=_clean(sentences),
            split=_split(_field(image, "split", where), where),
            image_id=str(_field(image, "cocoid", where, (int, str))) if "cocoid" in image else "",
            folder=_field(image, "filepath", where) if "filepath" in image else "",
        ))
    return entries


def coco(content: dict, path: Path) -> list[Entry]:
    """The entries of COCO's format: images[].{id, file_name}, annotations[].{image_id, caption}."""
    captions: dict = {}
    for number, annotation in enumerate(content["annotations"]):
        where = f"annotation {number} of {path}"
        captions.setdefault(_field(annotation, "image_id", where, (int, str)), []).append(
            _field(annotation, "caption", where))
    images = {}
    for number, image in enumerate(content["images"]):
        where = f"image {number} of {path}"
        key, name = _field(image, "id", where, (int, str)), _field(image, "file_name", where)
        if images.setdefault(key, name) != name:
            raise UserError(f"{where} has the id {key!r} of another one, {images[key]}; ids must be unique")
    if unknown := [key for key in captions if key not in images]:
        raise UserError(f"{path} has captions of image {unknown[0]!r}, which is not among its images "
                        f"({len(unknown)} such)")
    return [Entry(name, _clean(captions.get(key, [])), image_id=str(key)) for key, name in images.items()]


def _json(content, path: Path) -> list[Entry]:
    if isinstance(content, list):
        return [_object(item, f"item {number} of {path}") for number, item in enumerate(content)]
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(images, list) and all(isinstance(image, dict) for image in images):
        if isinstance(content.get("annotations"), list):
            return coco(content, path)
        if images and "sentences" in images[0]:
            return karpathy(content, path)
        if images:
            raise UserError(f"caption file {path} has images but neither annotations (COCO) nor sentences (Karpathy)")
    raise UserError(f"caption file {path} is neither Karpathy's JSON (images[].sentences[].raw) nor COCO's "
                    "(images and annotations) nor a list of {\"image\": …, \"caption\": …}")


def _lines(text: str, path: Path) -> list[Entry]:
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"line {number} of {path}"
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON: {error}") from None
            entries.append(_object(item, where))
    return entries


def _object(item, where: str) -> Entry:
    """An entry from {"image": …, "caption": … or "captions": […], "split"?: …}."""
    if isinstance(item, dict):
        named = _named(item)
        if "captions" in named and "caption" not in item:
            named.pop("caption", None)  # some text beside them
        item = {field: item[name] for field, name in named.items()}
    if not isinstance(item, dict) or "image" not in item or ("caption" in item) == ("captions" in item):
        raise UserError(f'{where} is not {{"image": …, "caption": …}} or {{"image": …, "captions": […]}}')
    captions = [item["caption"]] if "caption" in item else _field(item, "captions", where, list)
    if not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: a caption must be text")
    split = _split(_field(item, "split", where), where) if "split" in item else ""
    return Entry(_field(item, "image", where), _clean(captions), split)


def _named(given: Iterable[str]) -> dict[str, str]:
    """By field, what it is called among the names that are `given`."""
    spelled = {name.strip().lower(): name for name in given}
    return {field: spelled[name] for field, names in _FIELDS.items() if (name := next((name for name in names if name in spelled), ""))}


def _table(text: str, path: Path) -> list[Entry]:
    header = text.split("\n", 1)[0]
    for delimiter in (",", "\t", ";", "|"):
        columns = [column.strip().lower() for column in next(csv.reader([header], delimiter=delimiter), [])]
        named = _named(columns)
        if {"image", "caption"} <= set(named):
            break
    else:
        raise UserError(f"the first line of {path} must name the columns image, caption and, if you like, split; "
                        f"it is {header.strip()[:80]!r}")
    if twice := [named[field] for field in ("image", "caption", "split") if field in named and columns.count(named[field]) > 1]:
        raise UserError(f"the first line of {path} names the column {twice[0]} {columns.count(twice[0])} times; a photo with several "
                        "captions has a line for each")
    entries = []
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        next(rows)
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            where = f"line {rows.line_num} of {path}"
            if len(row) != len(columns):
                why = "captions that contain the separator must stand in double quotes" if len(row) > len(columns) else "a separator is missing"
                raise UserError(f"{where} has {len(row)} cells where the first line has {len(columns)}; {why}")
            cells = {field: row[columns.index(name)] for field, name in named.items()}
            split = _split(cells["split"].strip(), where) if "split" in cells else ""
            entries.append(Entry(cells["image"].strip(), _clean([cells["caption"]]), split))
    except csv.Error as error:
        raise UserError(f"line {rows.line_num} of {path} is not CSV: {error}") from None
    return entries


def _merge(entries: Iterable[Entry], path: Path) -> list[Entry]:
    """One entry a photo: the captions of all its lines."""
    merged: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        key = (entry.folder, entry.name)
        if not entry.name:
            raise UserError(f"{path} has a caption without an image name: {' '.join(entry.captions)[:60]!r}")
        try:
            " ".join([entry.name, entry.image_id, entry.folder, *entry.captions]).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{path} has half a character, {error.object[error.start]!r}, in what it says of {entry.name!r}; "
                            "write the whole one or leave it out") from None
        known = merged.get(key, Entry(entry.name, (), entry.split, entry.image_id, entry.folder))
        if known.split != entry.split:
            raise UserError(f"{path} puts {entry.name} into two splits, {known.split!r} and {entry.split!r}")
        merged[key] = Entry(entry.name, known.captions + entry.captions, entry.split, known.image_id, entry.folder)
    splits = {bool(entry.split) for entry in merged.values()}
    if len(splits) > 1:
        name = next(entry.name for entry in merged.values() if not entry.split)
        raise UserError(f"{path} gives some photos a split and others, such as {name}, none; give one to all or none")
    return list(merged.values())


def _field(item, key: str, where: str, kind=str):
    if not isinstance(item, dict) or not isinstance(item.get(key), kind) or isinstance(item[key], bool):
        raise UserError(f"{where} has no proper {key!r}")
    return item[key]


def _split(name: str, where: str) -> str:
    name = _SPLIT_NAMES.get(name.lower(), name.lower())
    if name and not (name.isascii() and name.replace("_", "").isalnum() and name != "all" and len(name) <= _LONGEST_SPLIT):
        raise UserError(f"{where}: {name[:80]!r} cannot be the name of a split; use train, val, test or another plain word")
    return name


def _clean(captions: Iterable[str]) -> tuple[str, ...]:
    return tuple(clean for caption in captions if (clean := " ".join(caption.split())))


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise UserError(f"caption file {path} is not UTF-8 ({where}); save it as UTF-8") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no caption file {path}") from None
    except OSError as error:
        raise UserError(f"caption file {path} cannot be read: {error.strerror or error}") from None


def _parsed(text: str, path: Path):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"caption file {path} is not JSON: {error}") from None

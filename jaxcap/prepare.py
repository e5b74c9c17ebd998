"""`python -m jaxcap.prepare DATASET …`: decodes and resizes the photos of a data set once, for all runs to come."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from jaxcap import config
from jaxcap.data import captions, coco, flickr8k, folder, places, records
from jaxcap.data.staging import PhotoBuilder, Plan
from jaxcap.errors import UserError, require_text, run_command

_MADE_OF = "made_of.json"  # beside the records of a folder
_SPLITS = ("train", "restval", "val", "test")  # the usual ones
_SHOWN = 20  # skipped photos named on the terminal; all of them are in skipped.txt

_DESCRIPTION = """\
Decodes and resizes every photo of a data set once and writes them, with their captions, as ArrayRecord.
Training then only reads. An interrupted command goes on where it was when it is run again; damaged and
missing photos are left out and named at the end."""

_EPILOG = """\
The size is the side in pixels that photos are stored at (aspect ratio ignored), at least the side that the
encoder sees: 224, 240 and 260 for EfficientNet-Lite 0, 1 and 2; 299 for Inception V3, or 346 to crop 299
out of it at random as im2txt does.

exit status: 0 done, even if some photos were left out; 2 nothing was written; 130 interrupted"""


_FLICKR8K = """\
--source holds Flicker8k_Dataset/*.jpg and Flickr8k_text/, in it Flickr8k.token.txt and the lists
Flickr_8k.{train,dev,test}Images.txt. The dev split is called val; a split without list or photos is not offered.

  python -m jaxcap.prepare flickr8k --source ~/flickr8k --size 260

"""

_COCO = """\
--source holds, packed or unpacked:
  train2014.zip  13.5 GB    val2014.zip  6.6 GB
  with --splits karpathy: caption_datasets.zip  37 MB, or the dataset_coco.json in it
  with --splits im2txt:   annotations_trainval2014.zip  253 MB, or annotations/captions_*.json
or is TFDS's own coco_captions/2014/1.1.0, written as ArrayRecord. Photos are read from the zips as they are.
--download takes them from images.cocodataset.org and cs.stanford.edu, resumes, and checks their SHA-256.
Karpathy's splits: train 82,783, restval 30,504, val 5,000, test 5,000 (papers train on data.train=train+restval).
im2txt's: train2014 and the first 85 % of val2014; the next 5 %; the last 10 %.

  python -m jaxcap.prepare coco --source ~/coco --download --size 346

"""

_FOLDER = """\
FILE is one of:
  CSV         first line image,caption[,split] in any order and case, also file_name, filename or image_name and text,
              comment or caption_text; one caption a line; also with tabs, ; or |
  JSON Lines  {"image": …, "caption": …} or {"image": …, "captions": […]}, and "split" if you like
  COCO        {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
  Karpathy    {"images": [{"filename", "split", "sentences": [{"raw"}]}]}, as in dataset_flickr30k.json
in UTF-8. Names are paths below --source, or file names that only one photo there has. Without splits in FILE
a hash of each photo's path decides, so a photo stays in its split when others are added.

  python -m jaxcap.prepare folder --source ~/holidays --captions captions.csv --label holidays --size 260

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status. Raises `UserError` if nothing could be prepared."""
    options = _parser().parse_args(arguments)
    if options.size < 1:
        raise UserError(f"--size must be at least 1, not {options.size}")
    if options.workers < 0:
        raise UserError(f"--workers must not be negative, not {options.workers}")
    data = _data(options)
    require_text(**{"--data-dir": places.data_dir(data)})
    path = places.find(data)
    if path.exists() and not options.force:
        _require_same(path, options)
        print(f"{places.dataset_name(data)} is already prepared at size {data.size} in {path} (--force does it anew)")
        return 0
    plan = options.plan(options)
    _announce(plan)
    builder = places.builder_class(data.name)(data, plan, options.workers)
    if options.dataset == "folder":
        builder.beside[_MADE_OF] = json.dumps(_made_of(options, plan), indent=1) + "\n"
    builder.prepare(anew=options.force)
    _report(data, builder)
    return 0


def _data(options: argparse.Namespace) -> config.Data:
    """The data set that a command line names; COCO's splits are its label where they are not the usual ones."""
    label = options.splits.replace("karpathy", "") if options.dataset == "coco" else getattr(options, "label", "")
    return config.Data(name=options.dataset, label=label, size=options.size, dir=options.data_dir)


def _made_of(options: argparse.Namespace, plan: Plan | None) -> dict[str, str | float]:
    """What tells a folder's records from others under its label, and lies beside them."""
    shares = {"val_share": options.val_share, "test_share": options.test_share}
    made_of = {"captions": str(options.captions.absolute()), "sha256": captions.digest(options.captions), **shares}
    return {**made_of, "photos": folder.digest(plan)} if plan else made_of


def _require_same(path: Path, options: argparse.Namespace) -> None:
    """Raises `UserError` where a folder's data set in `path` was made from other captions, photos or shares; what it does not say is let
    be, and so are photos that are not there any longer."""
    if options.dataset != "folder" or not (path / _MADE_OF).exists():
        return
    now = _made_of(options, options.plan(options) if options.source.is_dir() else None)
    try:
        before = {**now, **json.loads((path / _MADE_OF).read_text("utf-8"))}
    except (OSError, ValueError, TypeError):  # damaged
        return
    other = {key for key in now if before[key] != now[key]}
    way_out = "use --force to make it anew, or another --label"
    if "sha256" in other:
        raise UserError(f"{path} was made from other captions ({before['captions']}, as it was then); {way_out}")
    if other & {"val_share", "test_share"}:
        raise UserError(f"{path} was made with --val-share {before['val_share']} --test-share {before['test_share']}; {way_out}")
    if "photos" in other:
        raise UserError(f"{path} was made from other photos than --source {options.source} has now; {way_out}")


def _announce(plan: Plan) -> None:
    for split, photos in plan.splits.items():
        written = sum(len(photo.captions) for photo in photos)
        print(f"{split}: {len(photos):,} photos, {written:,} captions", flush=True)
    for split in sorted(plan.splits.keys() - set(_SPLITS)):
        print(f"beware    {split} is a split of its own, none of {', '.join(_SPLITS)}: mend the caption file, or name it in data.train or data.val",
              flush=True)


def _report(data: config.Data, builder: PhotoBuilder) -> None:
    path = builder.target
    skipped = builder.skipped
    for line in skipped[:_SHOWN]:
        print(f"left out  {line}")
    if len(skipped) > _SHOWN:
        print(f"left out  … and {len(skipped) - _SHOWN:,} more, all of them in {path / 'skipped.txt'}")
    for name in set(builder.plan.splits) - set(records.splits(data)):
        print(f"beware    {name} is empty: none of its photos can be read")
    counts = ", ".join(f"{name} {len(records.open_split(data, name)):,}" for name in records.splits(data))
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"prepared  {counts} photos, {size / 1e6:,.0f} MB in {path}")


def _parser() -> argparse.ArgumentParser:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m jaxcap.prepare", description=_DESCRIPTION, epilog=_EPILOG, **layout)
    datasets = parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--source", required=True, type=Path, metavar="DIR", help="where the photos and captions are")
    common.add_argument("--size", required=True, type=int, metavar="PIXELS", help="side of the stored photos")
    common.add_argument("--data-dir", default="", metavar="DIR",
                        help="where to write (default: $JAXCAP_DATA, or ~/.cache/jaxcap/data)")
    common.add_argument("--workers", type=int, default=0, metavar="N", help="decoding threads (default: one a core)")
    common.add_argument("--force", action="store_true", help="prepare again what is prepared already")

    command = datasets.add_parser("flickr8k", parents=[common], epilog=_FLICKR8K + _EPILOG, **layout,
                                  help="Flickr8k: Flicker8k_Dataset/ and Flickr8k_text/ in --source")
    command.set_defaults(plan=lambda options: flickr8k.plan(options.source))

    command = datasets.add_parser("coco", parents=[common], epilog=_COCO + _EPILOG, **layout,
                                  help="COCO 2014: the official archives in --source, or downloaded into it")
    command.add_argument("--splits", choices=("karpathy", "im2txt"), default="karpathy",
                         help="whose splits; im2txt's are data.name=coco data.label=im2txt in a config "
                              "(default: %(default)s)")
    command.add_argument("--download", action="store_true", help="download into --source what is not there")
    command.set_defaults(plan=lambda options: coco.plan(options.source, options.splits, options.download))

    command = datasets.add_parser("folder", parents=[common], epilog=_FOLDER + _EPILOG, **layout,
                                  help="your own photos and captions, Flickr30k, …: a directory and a caption file")
    command.add_argument("--captions", required=True, type=Path, metavar="FILE", help="caption file; see below")
    command.add_argument("--label", required=True, type=folder.check_label, metavar="NAME",
                         help="what to call it: data.name=folder data.label=NAME in a config")
    command.add_argument("--val-share", type=float, default=0.05, metavar="SHARE",
                         help="photos for val where FILE names no splits (default: %(default)s)")
    command.add_argument("--test-share", type=float, default=0.05, metavar="SHARE",
                         help="photos for test where FILE names no splits (default: %(default)s)")
    command.set_defaults(plan=lambda options: folder.plan(options.source, options.captions, options.val_share,
                                                          options.test_share))
    return parser


if __name__ == "__main__":
    run_command(main)

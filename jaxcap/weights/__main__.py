"""Lists, fetches, imports and checks published weights: `python -m jaxcap.weights list | fetch | import | check`."""

import argparse
import sys
from pathlib import Path
from urllib.parse import urlsplit

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxcap import encoders, weights
from jaxcap.caption import find
from jaxcap.data import photos
from jaxcap.encoders import EncoderSpec
from jaxcap.errors import UserError, run_command
from jaxcap.weights import recognize, store, tensorflow_file
from jaxcap.weights.published import FILES, PACKAGES

_DESCRIPTION = """\
Published ImageNet weights for the encoders. A config that says encoder.weights=imagenet finds them by itself: in
the store ($JAXCAP_WEIGHTS, or ~/.cache/jaxcap/weights), in a pip package, or by fetching the official file.

  python -m jaxcap.weights list
  python -m jaxcap.weights fetch inception_v3
  python -m jaxcap.weights import inception_v3_2016_08_28.tar.gz
  python -m jaxcap.weights check efficientnet_lite0 --photos holiday/
  python -m jaxcap.weights import model.ckpt-2000000 --vocabulary word_counts.txt --run runs/im2txt

Files are read without TensorFlow, Keras and PyTorch: .h5 of keras-applications, TF-slim checkpoints (.ckpt, .index
and .data, .tar.gz), .pth of torchvision, timm and efficientnet-lite-pytorch, .safetensors."""

_FOUND = "encoder.weights=imagenet now finds it"


def list_encoders() -> None:
    """Prints the encoders and where their weights are or would come from."""
    rows = [("encoder", "parameters", "top-1 %", "input", "weights")]
    for name in encoders.names():
        spec = encoders.get(name)
        here = store.here(spec)
        if here:
            where = "in the store" if here == store.path(spec) else f"pip package {PACKAGES[name][0].replace('_', '-')}"
        elif name in FILES:
            size = f", {FILES[name].size / 1e6:,.0f} MB" if FILES[name].size else ""
            where = f"to fetch from {urlsplit(FILES[name].url).hostname}{size}"
        else:
            where = "none published"
        millions = f"{spec.parameters / 1e6:.{1 if spec.parameters > 1e5 else 2}f} M"
        rows.append((name, millions, f"{spec.top1 or '–'}", f"{spec.image_size} px", where))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        aligned = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join([*aligned, row[4]]))
    print(f"\nThe store is {store.directory()}")


def recognized(file: Path) -> EncoderSpec:
    """The encoder that a file holds the weights of. Raises `UserError` if there is none."""
    tensors = weights.read(file)
    name = recognize.network(tensors)
    if name is None:
        raise UserError(f"{file} holds the weights of no encoder that is known here (its tensors are named like "
                        f"{', '.join(list(tensors)[:3]) or 'nothing'}); the encoders are {', '.join(encoders.names())}")
    return encoders.get(name)


def check(what: str, encoder: str | None, paths: list[Path]) -> int:
    """Loads weights for nothing but to see that all is there, and lets them name what is in photos.

    Returns the exit status: 1 if a photo could not be read.
    """
    spec, file = chosen(what, encoder)
    photo_paths = find(paths)
    try:
        variables = weights.load(file, spec, recognize.shapes(spec))
        tensors = flatten_dict(variables, sep="/")
        store.require_finite(file, tensors)
    except UserError as error:
        if file != store.path(spec) or spec.name not in FILES:
            raise
        raise UserError(f"{error}; to replace it: python -m jaxcap.weights fetch {spec.name} --force") from error
    values = sum(tensor.size for tensor in tensors.values())
    print(f"{file}: {spec.name}, {values:,} values in {len(tensors)} tensors, all there, all finite")
    if not paths:
        return 0
    kernel_FN, bias_N = weights.load_classifier(file, spec)
    classes = Path(__file__).with_name("imagenet_classes.txt").read_text("utf-8").splitlines()

    @jax.jit
    def probabilities(image_HWC):
        features_HWF = encoders.fold(spec, variables)(spec.preprocess(image_HWC[None] / 255))[0]
        return jax.nn.softmax(features_HWF.mean((0, 1)) @ kernel_FN + bias_N)

    skipped = 0
    for path in photo_paths:
        try:
            p_N = np.asarray(probabilities(jnp.asarray(photos.load(path, spec.image_size))))
        except photos.DamagedPhoto as error:
            skipped += 1
            print(f"skipped {path}: {error}", file=sys.stderr)
            continue
        print(f"{path}: " + ", ".join(f"{classes[n]} {p_N[n]:.0%}" for n in np.argsort(-p_N)[:3]))
    if skipped:
        print(f"{skipped} of {len(photo_paths)} photos could not be read", file=sys.stderr)
    return 1 if skipped else 0


def chosen(what: str, encoder: str | None) -> tuple[EncoderSpec, Path]:
    """The encoder to check and its file; `what` names either. Raises `UserError` if there is no such file."""
    if what in encoders.names():
        spec = encoders.get(what)
        if encoder not in (None, what):
            raise UserError(f"--encoder says which network a FILE is, and {what} is an encoder")
        file = store.here(spec)
        if file is None:
            raise UserError(f"the weights of {what} are not here; run: python -m jaxcap.weights fetch {what}" if what in FILES
                            else f"there are no published weights of {what}")
        return spec, file
    file = Path(what)
    if not (file.exists() or file.suffix or file.name != what or tensorflow_file.is_tensorflow(file)):
        encoders.get(what)  # no file, so a name, and not a right one: this says which is near
    return encoders.get(encoder) if encoder else recognized(file), file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jaxcap.weights", description=_DESCRIPTION,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the encoders, and where their weights are")
    fetch = commands.add_parser("fetch", help="download official files into the store, checksummed; resumes")
    fetch.add_argument("encoders", nargs="+", metavar="ENCODER")
    fetch.add_argument("--force", action="store_true", help="replace what is here already")
    taker = commands.add_parser("import", help="take a file at hand into the store, or make a run of an im2txt checkpoint")
    taker.add_argument("file", type=Path, metavar="FILE", help="of a checkpoint of several files: their common beginning")
    taker.add_argument("--encoder", metavar="NAME", help="which network it is (default: recognized by its tensors)")
    taker.add_argument("--vocabulary", type=Path, metavar="FILE", help="im2txt: its word_counts.txt")
    taker.add_argument("--run", type=Path, metavar="DIR", help="im2txt: the run directory to make")
    checker = commands.add_parser("check", help="see that weights are whole; with --photos, that they see")
    checker.add_argument("what", metavar="ENCODER|FILE")
    checker.add_argument("--encoder", metavar="NAME", help="which network FILE is (default: recognized by its tensors)")
    checker.add_argument("--photos", nargs="+", type=Path, default=[], metavar="PATH",
                         help="photos and folders with their subfolders; prints the three likeliest of ImageNet's classes for each")
    arguments = parser.parse_args(argv)
    if arguments.command == "list":
        list_encoders()
    elif arguments.command == "fetch":
        specs = [encoders.get(name) for name in arguments.encoders]  # an unknown name fails before anything is fetched
        for spec in specs:
            here = store.here(spec)
            if here and not arguments.force:
                print(f"{spec.name} is here already: {here} (--force fetches it all the same)")
            else:
                print(f"{store.fetch(spec)}: encoder.name={spec.name} {_FOUND}")
    elif arguments.command == "check":
        return check(arguments.what, arguments.encoder, arguments.photos)
    elif arguments.run or arguments.vocabulary:
        if not (arguments.run and arguments.vocabulary):
            raise UserError("an im2txt checkpoint needs both --vocabulary word_counts.txt and --run DIRECTORY")
        from jaxcap.weights import im2txt  # with all that trains and searches

        run = im2txt.import_run(arguments.file, arguments.vocabulary, arguments.run)
        print(f"{run.directory}: {len(run.vocab):,} words, step {run.step:,}; caption photos with: "
              f"python -m jaxcap.caption {run.directory} photo.jpg")
    else:
        spec = encoders.get(arguments.encoder) if arguments.encoder else recognized(arguments.file)
        print(f"{store.put(arguments.file, spec, source=arguments.file.name)}: encoder.name={spec.name} {_FOUND}")
    return 0


if __name__ == "__main__":
    run_command(main)

"""Prints the tables of all result files of a directory: `python -m benchmarks.summary DIR`."""

import argparse
import sys
from pathlib import Path

from benchmarks import timing
from jaxcap.errors import UserError, run_command


def section(path: Path) -> str:
    """A result file's title, machine and table. Raises `UserError` where it is none."""
    result = timing.read_result(path)
    verdict = "cut short" if path.suffix == ".partial" else "ok" if result["ok"] else "WRONG"
    about = timing.describe(result["machine"]).splitlines()[0]
    return f"{result['title']}: {verdict}   ({about})\n{timing.table(result['table'])}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary",
                                     description="Prints the tables of all result files of a directory. Exit status 2 if one cannot be read.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where benchmarks wrote their --json files")
    directory = parser.parse_args(argv).directory
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; name the one that benchmarks wrote their --json files to")
    paths, status = sorted([*directory.glob("*.json"), *directory.glob("*.json.partial")]), 0
    for path in paths:
        try:
            print(f"\n{section(path)}", flush=True)
        except UserError as error:
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
            status = 2
    if not paths:
        print(f"no results in {directory}")
    return status


if __name__ == "__main__":
    run_command(main)

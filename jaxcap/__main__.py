"""What there is: `python -m jaxcap` names the commands."""

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxcap.errors import UserError, run_command

_COMMANDS = {"prepare": "prepare.py", "train": "train.py", "evaluate": "evaluate.py", "caption": "caption.py", "weights": "weights/__main__.py"}


def main(arguments: Sequence[str]) -> int:
    """Prints the commands. Raises `UserError` for arguments, which it does not take."""
    if arguments and list(arguments) not in (["--help"], ["-h"]):
        raise UserError(f"python -m jaxcap takes no arguments, not {arguments[0]!r}; the commands are "
                        f"{', '.join(f'python -m jaxcap.{name}' for name in _COMMANDS)}")
    print("Train image captioners fast. The commands, each of which explains itself with --help:\n")
    for name, file in _COMMANDS.items():
        print(f"  python -m jaxcap.{name:<10}{_purpose(Path(__file__).parent / file)}")
    return 0


def _purpose(file: Path) -> str:
    """The first line of a module's docstring without the command in it; the module is not imported, which takes seconds."""
    before, _, after = ast.get_docstring(ast.parse(file.read_text("utf-8"))).split("\n")[0].split("`")
    purpose = (before + after).strip(": .")
    return purpose[0].upper() + purpose[1:]


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))

"""A process a library, and the pipe to it: questions and answers, one JSON object a line.

Two libraries in one process would get in each other's way: both keep as many threads as there are cores, and idle ones go on
spinning for a while. A child a library, asleep in a read until it is its turn, leaves every core to the other.

    python -m benchmarks.peers.child {jaxcap,torch,keras} DIRECTORY      is what `Child` starts
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks.peers.forms import LIBRARIES
from jaxcap.errors import UserError

ROOT = Path(__file__).parents[2]


class Child:
    """One side of the comparison, "jaxcap" or a key of `forms.LIBRARIES`, in a process of its own.

    Raises `UserError` where `python` cannot run it.
    """

    def __init__(self, side: str, python: str, directory: Path, environment: dict[str, str] | None = None):
        self._side, self._python, self._option = side, python, _option(side)
        if os.sep in python:
            python = os.path.abspath(python)  # the child starts in another folder
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        try:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.peers.child", side, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, cwd=ROOT, env={**os.environ, **(environment or {}), "PYTHONPATH": path})
        except OSError as error:
            raise UserError(f"{self._option} {python} cannot be run: {error.strerror}") from error

    def ask(self, do: str, **arguments: Any) -> dict:
        """The child's answer. Raises what went wrong there: `UserError` or, in its words, `RuntimeError`."""
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        try:
            answer = json.loads(line)
        except ValueError:
            if do != "hello":
                status = self._process.wait()
                raise RuntimeError(f"the process of {self._side} ended in the middle of {do!r}, exit status {status}") from None
            raise UserError(f"{self._option} {self._python} is no Python that can run this repository") from None
        if "user_error" in answer:
            raise UserError(answer["user_error"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the child: it leaves when its input does, or is ended five seconds later."""
        try:
            self._process.stdin.close()
            self._process.wait(5)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


def _option(side: str) -> str:
    return "--peer-python" if side in LIBRARIES else "--jaxcap-python"


def serve(side: str, directory: Path) -> None:
    """Answers what is asked on stdin until it ends. What a library prints goes to stderr, not between the answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; this process ends when its input does
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    served = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if served is None:
                served = importlib.import_module(f"benchmarks.peers.{side}_side").Side(directory)
            answer = getattr(served, question.pop("do"))(**question)
        except ModuleNotFoundError as error:
            package = LIBRARIES[side].package if side in LIBRARIES else "jaxcap"
            answer = {"user_error": f"{sys.executable} has no {error.name}: pip install {package} there, or name the Python "
                                    f"that has it with {_option(side)}"}
        except UserError as error:
            answer = {"user_error": str(error)}
        except Exception as error:  # a form that does not run is a result, not the end
            if os.environ.get("JAXCAP_PEERS_DEBUG"):
                traceback.print_exc()
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            answer = {"error": f"{type(error).__name__}: {first[:300]}"}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))

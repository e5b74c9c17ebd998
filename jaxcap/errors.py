"""What the person in front of the terminal did wrong, and how a command says so."""

import errno
import functools
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Input that only the user can mend: one clear sentence saying what, where, and what to do.

    Commands print it without a traceback and exit with status 2.
    """


class Stopped(Exception):
    """A signal asked for an end, and what was done so far is kept."""


_COMMANDS = ("jaxcap.", "benchmarks.")  # how the modules that are commands are named


def _end(number, frame) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(128 + number)


def end_at_interrupt() -> None:
    """Where Python is on its way to a command's module (`python -m jaxcap.train`), has Ctrl-C end it until `run_command` begins.

    Nothing is begun that could be lost, while an exception is a page of other packages' code, or dropped as they collect garbage.
    """
    on_its_way = sys.argv[:1] == ["-m"] and any(word.removeprefix("-m").startswith(_COMMANDS) for word in sys.orig_argv)
    if on_its_way and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _show_or_repeat(what: Any, shown: Callable[[Any], object]) -> None:
    """Shows an error that nothing can catch, but has an interrupt come again: Python drops those that arrive while it collects garbage."""
    if not isinstance(what.exc_value, KeyboardInterrupt):
        return shown(what)
    later = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    later.daemon = True
    later.start()


def free_or(otherwise: str, error: Exception) -> str:
    """How to mend what could not be written: `otherwise`, or also to free the disk where it may be full."""
    may_be_full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT)  # None: another library's words for any of them
    return f"free the disk or {otherwise}" if may_be_full else otherwise


def require_text(**names) -> None:
    """Raises `UserError` for the first name, by its option, whose bytes are no UTF-8: what writes records and checkpoints needs it."""
    for option, name in names.items():
        try:
            str(name).encode()
        except UnicodeEncodeError:
            raise UserError(f"{option} {os.fsencode(str(name))!r} is not UTF-8; choose another name") from None


def _memory_lacks(error: Exception) -> str:
    """The sentence for an error of JAX's or NumPy's that says so, "" for another one."""
    if not (isinstance(error, MemoryError) or type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)):
        return ""
    found = re.search(r"allocat\w+ ([\d.]+) ?(\w+)", str(error))
    number, unit = found.groups() if found else ("", "")
    amount = f"{float(number) / 2**30:,.1f} GiB" if unit == "bytes" else f"{number.rstrip('.')} {unit}"
    asked = f": {amount} were asked for at once" if found else ""
    return f"there is not enough memory{asked}; lower the batch (batch_size, eval_batch_size or --batch-size) or the beam"


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits with its status: 2 and one sentence on a `UserError`. SIGTERM ends it as an exception does,
    so that what it wrote for a time is gone and no child is left."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    shown = sys.unraisablehook
    sys.unraisablehook = functools.partial(_show_or_repeat, shown=shown)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of file names that are no text
    try:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # who read the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except OSError as error:  # of a file or folder that nobody expected to be beyond reach
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        status = 2
    except Exception as error:
        if not (sentence := _memory_lacks(error)):
            raise
        print(f"error: {sentence}", file=sys.stderr)
        status = 2
    sys.unraisablehook = shown
    sys.exit(status)

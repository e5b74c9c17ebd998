"""Locks between processes: what one holds, the others leave alone."""

import fcntl
from typing import IO

from jaxcap.errors import UserError


def hold(opened: IO | int, refusal: str) -> None:
    """Holds an open file or directory until it is closed. Raises `UserError(refusal)` where another process holds it.

    A file system that has no locks is let be.
    """
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(refusal) from None
    except OSError:
        pass

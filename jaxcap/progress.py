"""The progress bars of commands: on stderr, with a rate and an ETA."""

import sys

from tqdm import tqdm

silent = False  # in all processes of a run but the first


def bar(what: str, total: int | None, unit: str = " photos", initial: int = 0) -> tqdm:
    """A bar (without a total: a counter) that speaks often on a terminal and seldom into a log; unit "B" is written with k, M, G."""
    pause_s = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(desc=what, total=total, unit=unit, unit_scale=unit == "B", initial=initial, mininterval=pause_s, disable=silent,
                dynamic_ncols=True)

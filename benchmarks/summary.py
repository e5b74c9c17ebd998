"""Prints the tables of all result files of a directory: `python -m benchmarks.summary DIR`."""

import json
import sys
from pathlib import Path

from benchmarks import timing

directory = Path(sys.argv[1])
paths = sorted([*directory.glob("*.json"), *directory.glob("*.json.partial")])
for path in paths:
    result = json.loads(path.read_text("utf-8"))
    verdict = "cut short" if path.suffix == ".partial" else "ok" if result["ok"] else "WRONG"
    about = timing.describe(result["machine"]).splitlines()[0]
    print(f"\n{result['title']}: {verdict}   ({about})\n{timing.table(result['table'])}")
if not paths:
    print(f"no results in {directory}")

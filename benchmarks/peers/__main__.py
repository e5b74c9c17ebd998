"""jaxcap and PyTorch or Keras take the same step, turn by turn on the same machine: `python -m benchmarks.peers`."""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import timing
from benchmarks.peers import forms
from benchmarks.peers.comparison import LIMITS, Comparison
from benchmarks.peers.forms import BEAM, LIBRARIES
from benchmarks.timing import short
from benchmarks.workload import KINDS
from jaxcap.errors import UserError, run_command

CACHED = {BEAM, *(name for name, kind in KINDS.items() if kind.cached)}  # these skip the CNN


def best(results: list[dict]) -> list[dict]:
    """Of every kind and batch the peer's form that took the least of jaxcap's time beside it: forms have turns of their own."""
    groups = {}
    for result in results:
        if is_timed(result):
            groups.setdefault((result["kind"], result["batch"]), []).append(result)
    return [max(group, key=lambda result: result["ms"]["ratio"]["median"]) for group in groups.values()]


def is_timed(result: dict) -> bool:
    return "ms" in result and "error" not in result


def rows(results: list[dict], peer: str) -> list[list[str]]:
    """The table of results, beside the library of that name."""
    lines = [["step", f"{peer}'s form", "batch", "jaxcap, ms", f"{peer}, ms", f"jaxcap ÷ {peer}", "min – max", "of CPU time",
              "loss apart", "gradient apart", "ready in"]]
    chosen = best(results)
    for r in results:
        lstm = r.get("peer_lstm_dtype", r.get("dtype"))
        form = r["form"] + (f", LSTM in {lstm}" if lstm != r.get("dtype") else "") + (" (best)" if r in chosen else "")
        start = [r["kind"] + (" *" if r["kind"] in CACHED else ""), form, str(r["batch"])]
        times = ["–", "failed" if "error" in r else "–", "–", "–", "–"]
        if is_timed(r):
            ratio = r["ms"]["ratio"]
            times = [*(short(statistics.median(r["ms"][side])) for side in ("jaxcap", "peer")), f"{ratio['median']:.2f}",
                     f"{ratio['min']:.2f} – {ratio['max']:.2f}", f"{r['cpu_ms']['ratio']['median']:.2f}"]
        errors = ["–" if r.get(key) is None else f"{r[key]:.1e}" for key in ("loss_apart", "gradient_apart")]
        lines.append([*start, *times, *errors, short(r.get("peer_ready_s"), " s")])
    return lines


def heading(about: dict, machine: dict, dtype: str) -> str:
    """What is compared, and on what."""
    peer = LIBRARIES[about["peer"]].name
    whole = f"all {machine['cores']} cores" if about["platform"] == "cpu" else "the whole device"
    threads = f"{peer} has {about['threads']} threads"
    if about["omp_wait_policy"]:
        threads += f", OMP_WAIT_POLICY={about['omp_wait_policy']}"
    cached = ["jaxcap's programs may come from JAX_COMPILATION_CACHE_DIR: when it is ready says nothing of compilation"]
    return "\n".join([
        f"one step in jaxcap (jax {about['jax']}) and in {peer} {about['peer_version']}: {about['encoder']} at {about['size']} px, "
        f"LSTM {about['hidden']}, {about['vocabulary']:,} words, {about['tokens']} tokens a caption; {dtype}, random data",
        timing.describe(machine),
        f"a process a library, turn by turn: each has {whole} while the other sleeps; {threads}",
        *(cached if about["compilation_cache"] else [])])


def verdicts(results: list[dict], peer: str) -> list[str]:
    """A line for every kind and batch, which also says what has no time: the form that is missing might be the best."""
    return [_verdict(r, peer, [other for other in results if (other["kind"], other["batch"]) == (r["kind"], r["batch"])
                               and not is_timed(other)]) for r in best(results)]


def _verdict(r: dict, peer: str, missing: list[dict]) -> str:
    of_those, why = "", ""
    if missing:
        reasons = [f"{m['form']} failed: {m['error']}" if "error" in m else f"{m['form']} was not timed" for m in missing]
        of_those, why = " of those that ran", f" ({'; '.join(reasons)})"
    return (f"{r['kind']}, batch {r['batch']}: jaxcap takes {r['ms']['ratio']['median']:.2f} times as long as {peer}'s best form"
            f"{of_those}, {r['form']}{why}; ready to step after {short(r['jaxcap_ready_s'], ' s')}, {peer} after "
            f"{short(r['peer_ready_s'], ' s')}")


def parser() -> argparse.ArgumentParser:
    words = "\n".join(f"a form of {of.name}'s is `eager` or words joined by +:\n"
                      + "".join(f"  {word:<14} {meaning}\n" for word, meaning in of.words.items()) for of in LIBRARIES.values())
    loss, _, encoder = LIMITS["float32"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Takes the steps of benchmarks.step_time in jaxcap and in PyTorch or Keras, with the same parameters, photos\n"
                    "and captions, and times them turn by turn in two processes. First both must agree: loss and norm of every\n"
                    f"gradient, in float32 with nothing random, to {loss:g} (the encoder's under batch statistics to {encoder:g}).\n"
                    "Every form of the peer's takes its turns with jaxcap as soon as it is ready, in the order of --kinds and --forms.\n\n"
                    "A ratio below 1 means that jaxcap is the faster. It is the median over the turns, in each jaxcap's time\n"
                    "over the peer's; `of CPU time` is the same of the cores' work, which others on the machine disturb less.\n"
                    "Compilation and warm-up do not count: `ready in` is what they took. The peer is timed in several forms\n"
                    "and the best one counts, beside which jaxcap's ratio is the highest. FILE.partial has all turns so far.",
        epilog=words + "\n"
               "examples:\n"
               "  python -m benchmarks.peers --kinds cached --batch 32 256\n"
               "  python -m benchmarks.peers --kinds joint --forms eager channels_last --peer-python ~/torch/bin/python\n"
               "  python -m benchmarks.peers --peer keras --peer-python ~/keras/bin/python\n"
               "  python -m benchmarks.peers --dtype bfloat16 --json now.json           on a GPU, where one Python has both")
    parser.add_argument("--peer", choices=list(LIBRARIES), default="torch",
                        help="torch is PyTorch, keras is Keras on TensorFlow (default: torch)")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, BEAM], default=[*KINDS, BEAM],
                        help="kinds of step, and beam: captions by beam search (default: all)")
    parser.add_argument("--batch", nargs="+", type=timing.count, metavar="B", help="photos a step (default: 32)")
    parser.add_argument("--forms", nargs="+", metavar="FORM",
                        help="forms of the peer's step; KIND:FORM is for that kind alone (default: those worth trying there)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the arithmetic; bfloat16 is autocast in PyTorch, where what does not learn is rounded once, and "
                             "mixed_bfloat16 in Keras; float32 may be TF32 on a GPU, in both. cuDNN's LSTM is float16 under "
                             "PyTorch's autocast: the table says so")
    parser.add_argument("--turns", type=timing.count, default=5, metavar="N", help="timings of each (default: 5)")
    parser.add_argument("--turn-s", type=timing.amount, default=timing.REPEAT_S, metavar="S",
                        help=f"seconds that a turn is to take, at least one step (default: {timing.REPEAT_S})")
    parser.add_argument("--limit", type=timing.count, default=300, metavar="S",
                        help="seconds that a form may take to get ready, compilation included (default: 300)")
    for side, name in (("jaxcap", "jaxcap"), ("peer", "the other library")):
        parser.add_argument(f"--{side}-python", default=sys.executable, metavar="PATH",
                            help=f"Python that has {name} (default: this one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--tiny", action="store_true", help="a miniature that only shows that everything runs and agrees")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    for form in arguments.forms or []:
        forms.parse(arguments.peer, form)
    peer = LIBRARIES[arguments.peer].name
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process only asks what the device is
    file = timing.ResultFile(arguments.json, f"peers {arguments.peer} {arguments.dtype}")
    machine, results = file.result["machine"], file.result["results"]

    def save(finished: bool = False) -> None:
        file.result["verdicts"] = verdicts(results, peer)
        file.save(rows(results, peer), finished=finished)

    timing.calm_torch(machine)
    with tempfile.TemporaryDirectory(prefix="jaxcap-peers-") as directory:
        both = Comparison(Path(directory), peer=arguments.peer, jaxcap_python=arguments.jaxcap_python,
                          peer_python=arguments.peer_python, tiny=arguments.tiny, dtype=arguments.dtype)
        try:
            file.result["settings"] = {**both.about, "dtype": arguments.dtype, "tiny": arguments.tiny}
            print(heading(both.about, machine, arguments.dtype), flush=True)
            for batch in arguments.batch or [both.about["batch"]]:
                for kind in arguments.kinds:
                    tried = forms.wanted(arguments.peer, kind, both.platform, arguments.dtype, arguments.forms)
                    if not tried:
                        continue
                    before = len(results)
                    try:
                        for found in both.measure(kind, batch, tried, turns=arguments.turns, turn_s=arguments.turn_s,
                                                  limit_s=arguments.limit, say=_say):
                            results[before:] = found
                            save()
                    except RuntimeError as error:  # above all: more than fits into the device's memory
                        results.append({"kind": kind, "batch": batch, "form": "–", "error": str(error)})
                        save()
        finally:
            both.close()
    if not results:
        raise UserError("none of --forms means anything for these --kinds on this device; --help explains their words")
    tried = {(r["kind"], r["batch"]) for r in results}
    file.result["ok"] = len(best(results)) == len(tried) and not any("agree" in r.get("error", "") or r["form"] == "–" for r in results)
    print("\n" + timing.table(rows(results, peer)))
    if CACHED & set(arguments.kinds):
        print("* skips the CNN in both: its photos' features were computed before")
    for line in [f"{r['kind']}, batch {r['batch']}, {r['form']}: {r['error']}" for r in results if "error" in r]:
        print(line)
    print("\n".join(verdicts(results, peer)))
    save(finished=True)
    return 0 if file.result["ok"] else 1


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)

"""What `benchmarks.step_time` says of its results: heading, table, notes, comparison with earlier ones, time still to go."""

from collections.abc import Callable, Sequence

from benchmarks import timing, workload
from benchmarks.timing import Peak, Timing, short
from jaxcap import config as configs
from jaxcap.errors import UserError

# Seconds that a step of 32 photos took in 2016 on one NVIDIA K20, a card of 3.5 TFLOP/s in float32; both from the
# announcement of im2txt (Google Research blog, 22 September 2016).
THEN_S = {"TensorFlow 2016": 0.7, "DistBelief 2016": 3.0}
THEN_BATCH, THEN_CARD, THEN_TFLOPS = 32, "one NVIDIA K20", 3.52
PAYS = 1.05  # a larger batch that gives less than so many times the photos a second is not worth it
# About the time of the steps that run the CNN, one beside the other.
CNN_WORK = {"eval": 1, "frozen": 1, "frozen_5": 1.2, "joint": 4.5, "joint_5": 4.7}


def rows(results: list[dict]) -> list[list[str]]:
    """The table of results."""
    lines = [["step", "batch", "input", "ms", "min – max", "photos/s/device", "GFLOP", "GB", "of peak", "memory", "compile",
              *(f"× {who}" for who in THEN_S)]]
    for r in results:
        name = r["kind"] + (" *" if r.get("skips_cnn") else "")
        if "error" in r:
            lines.append([name, str(r["batch"]), input_of(r), "failed", *["–"] * (len(lines[0]) - 4)])
            continue
        spread = Timing(tuple(r["ms"]["repeats"]), 1).spread
        gb = ("≥ " if r["gb_is_lower_bound"] else "") + short(r["gb"])
        share = None if r["share_of_peak"] is None else 100 * r["share_of_peak"]
        memory = short(r["program_gib"], " GiB")
        lines.append([name, str(r["batch"]), input_of(r), short(r["ms"]["median"]), spread, short(r["photos_per_s_per_device"]),
                      short(r["gflop"]), gb, short(share, " %"), memory, short(r["compile_s"], " s"),
                      *(short(r["times_faster"].get(who), " ×") for who in THEN_S)])
    return lines


def input_of(result: dict) -> str:
    """"synthetic" or "real"; files from before there was a choice do not say."""
    return result.get("input", "synthetic")


def change(was: dict, now: dict) -> str:
    """From one time to another, `ms` of two results, and whether that is more than they vary by themselves."""
    apart = now["min"] > was["max"] or now["max"] < was["min"]
    return f"{100 * (now['median'] / was['median'] - 1):+.1f} %" + ("" if apart else ", within the spread")


def notes(results: list[dict]) -> list[str]:
    """What the table does not say, a line each."""
    timed = [r for r in results if "ms" in r]
    lines = ["* skips the CNN: its photos' features were computed before"] if any(r.get("skips_cnn") for r in timed) else []
    if any(r.get("captions_per_photo", 1) > 1 for r in timed):
        lines.append("_5: a photo's five captions share one look; in 2016, and in the other rows, every caption had its own")
    if slow := [named(r) for r in timed if r.get("scaled_down")]:
        lines.append(f"{timing.FEWEST} repeats instead of {timing.MOST}, as a step takes over {timing.SLOW_STEP_S:g} s: "
                     + "; ".join(slow))
    synthetic = {(r["kind"], r["batch"]): r["ms"] for r in timed if input_of(r) == "synthetic"}
    return lines + [f"real input instead of synthetic, {r['kind']}, batch {r['batch']}: {change(synthetic[key], r['ms'])}"
                    for r in timed if input_of(r) == "real" and (key := (r["kind"], r["batch"])) in synthetic]


def growing(results: list[dict], kind: str, way: str, batch: int, limit_gib: float) -> bool:
    """Whether twice this batch may give more photos a second: it did when the batch was doubled last, and has the memory."""
    of = {r["batch"]: r for r in results if (r["kind"], input_of(r)) == (kind, way) and "ms" in r}
    if batch not in of or 2 * (of[batch]["program_gib"] or 0) > limit_gib:
        return False
    half = of.get(batch // 2)
    return half is None or _rate(of[batch]) >= PAYS * _rate(half)


def saturated(results: list[dict]) -> list[str]:
    """For each kind of step and input the smallest batch that is nearly as fast as the fastest, a line each."""
    lines, groups = [], {}
    for r in results:
        if "ms" in r:
            groups.setdefault((r["kind"], input_of(r)), []).append(r)
    for (kind, way), group in groups.items():
        group = sorted(group, key=lambda r: r["batch"])
        best = max(map(_rate, group))
        first = next(r for r in group if PAYS * _rate(r) >= best)
        last = group[-1]
        tried = f"{kind}, {way}: {{}} {first['batch']}, {short(_rate(first))} photos/s/device"
        if first is last:
            lines.append(tried.format("still growing at batch") + ", the largest that was tried or had memory")
        else:
            lines.append(tried.format("saturated from batch") + f"; up to batch {last['batch']} at most {short(best)}")
    return lines


def _rate(result: dict) -> float:
    return result["photos_per_s_per_device"]


def named(result: dict) -> str:
    return f"{result['kind']}, batch {result['batch']}, {input_of(result)}"


def to_go_s(done: list[dict], to_come: list[tuple[str, int]]) -> float:
    """About the seconds that rows of (kind, batch) will take, by those that are done: only of rows whose steps are so slow that
    a row takes as long as they do."""
    total = 0.0
    for kind, batch in to_come:
        like = [r for r in done if "ms" in r and r["ms"]["median"] * r["ms"]["calls_per_repeat"] > 2000 * timing.REPEAT_S
                and (r["kind"] == kind or {r["kind"], kind} <= CNN_WORK.keys())]
        if like:
            r = max(like, key=lambda r: r["kind"] == kind)  # the same kind if it can be
            total += r["took_s"] * batch / r["batch"] * CNN_WORK.get(kind, 1) / CNN_WORK.get(r["kind"], 1)
    return total


def heading(of: workload.Settings, about: dict, best: Peak | None, real: dict | None = None, overrides: Sequence[str] = ()) -> str:
    """What is measured, on what, and what it is set beside. real: of `real_input.Source`. overrides: settings that are not im2txt's."""
    config = of.config
    lines = [
        f"jaxcap, one step: {config.encoder.name} at {config.encoder.size} px out of {config.data.size} px uint8, "
        f"{config.decoder.name.upper()} "
        f"{config.decoder.hidden}, embedding {config.decoder.embedding}, {of.vocabulary:,} words, {of.tokens} tokens a "
        f"caption; {config.encoder.dtype}, {config.parallel}; random data",
        *([f"NOT im2txt's settings: {' '.join(overrides)}"] if overrides else []),
        *([f"real input: {'; '.join(real.values())}; captions as for synthetic input"] if real else []),
        timing.describe(about),
        f"beside it: {', '.join(f'{who} {s} s' for who, s in THEN_S.items())} for 32 photos on {THEN_CARD}",
    ]
    if best is not None and (rate := getattr(best, config.encoder.dtype)):
        lines.append(f"a device like this does at most {short(rate)} TFLOP/s in {config.encoder.dtype} (as XLA multiplies), "
                     f"{rate / THEN_TFLOPS:.0f} times a K20 in float32")
    return "\n".join(lines)


def _changed(old: dict, new: dict) -> list[str]:
    """The settings in which two results differ, a line each. One that came later had its default value before."""
    try:
        lines = configs.differences(*(configs.from_dict(settings["config"]) for settings in (old, new)))
    except UserError as error:
        lines = [f"which are another version's: {error}"]
    return lines + [f"{key}: {old[key]} → {new[key]}" for key in ("vocabulary", "tokens", "tiny") if old[key] != new[key]]


def against(old: dict, new: dict, about: Callable[[dict], dict], lines: list[list[str]], same: str) -> str:
    """The `lines` of what two result files have in common below a heading, with a warning where they do not compare.

    about: what of a file beside its settings has to be the same. same: what a step has to have in common with an earlier one.
    """
    if len(lines) == 1:
        return f"nothing to compare: no {same} is in both"
    was, now = about(old), about(new)
    warnings = [f"{what} differs: {was[what]} → {now[what]}" for what in now if was[what] != now[what]]
    warnings += [f"the settings differ, {line}" for line in _changed(old["settings"], new["settings"])]
    if "real_input" in old and "real_input" in new and old["real_input"] != new["real_input"]:
        warnings.append("the real input differs")
    title = f"against commit {old['machine']['commit'] or 'unknown'} of {old['machine']['date']}"
    return "\n".join([title, *(f"  beware: {warning}" for warning in warnings), timing.table(lines)])


def comparison(old: dict, new: dict) -> str:
    """Two result files side by side, with a warning where they do not compare."""

    def about(file):
        return {what: file["machine"][what] for what in ("device", "devices", "cores", "jax")}

    def key(r):
        return r["kind"], r["batch"], input_of(r), r["dtype"], r["parallel"]

    before = {key(r): r["ms"] for r in old["results"] if "ms" in r}
    lines = [["step", "batch", "input", "dtype", "before, ms", "now, ms", "change"]]
    for r in new["results"]:
        if "ms" in r and key(r) in before:
            was, now = before[key(r)], r["ms"]
            lines.append([r["kind"], str(r["batch"]), input_of(r), r["dtype"], short(was["median"]), short(now["median"]),
                          change(was, now)])
    return against(old, new, about, lines, "step, batch, input, dtype and parallel mode")

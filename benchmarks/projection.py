"""What im2txt's whole schedule costs by measured steps, and on many devices by arithmetic: `python -m benchmarks.projection`."""

import argparse
import contextlib
import dataclasses
import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import scaling, step_time, timing, workload
from benchmarks.step_report import THEN_S
from benchmarks.timing import short
from benchmarks.workload import FROZEN, JOINT, Settings
from jaxcap import config as configs
from jaxcap.errors import UserError, run_command

RECORDS = Path(__file__).parent / "records"
DEVICES = (8, 64, 512)
PHASES = {"frozen": FROZEN, "joint": JOINT}  # kind of step → its phase of configs/im2txt.py


@dataclass(frozen=True)
class Link:
    """What connects two devices. gb_per_s: sent by one device in one direction, at most. hop_us: latency of a step."""

    gb_per_s: float
    hop_us: float


# Bandwidths: the makers' datasheets, half of what they give for both directions together. Latencies: what NCCL's own cost
# model assumes for one step of a ring (its tuning table, "Simple" protocol), by NVLink, PCIe and network.
LINKS = {
    "nvlink5": Link(900, 3.4),  # B200
    "nvlink4": Link(450, 3.4),  # H100, H200
    "nvlink3": Link(300, 3.4),  # A100
    "pcie5": Link(63, 5.7),
    "pcie4": Link(31.5, 5.7),
    "infiniband-ndr": Link(50, 14.0),  # 400 Gb/s an adapter
    "infiniband-hdr": Link(25, 14.0),
    "ethernet-100": Link(12.5, 14.0),
    "ethernet-10": Link(1.25, 14.0),
}


@dataclass(frozen=True)
class Ring:
    """How the devices are connected: machines of `together` devices joined by `inside`, the machines by `between`."""

    inside: Link
    between: Link
    together: int = 8

    def all_reduce_s(self, size: int, devices: int) -> float:
        """Seconds to sum `size` bytes over a ring: every device sends 2 (n − 1) / n of them in 2 (n − 1) steps.

        The slowest link of the ring sets the pace; of the steps, 2 (machines − 1) are as slow as the links between machines.
        """
        machines = math.ceil(devices / self.together)
        slowest = min(self.inside.gb_per_s, self.between.gb_per_s) if machines > 1 else self.inside.gb_per_s
        steps, outside = 2 * (devices - 1), 2 * (machines - 1)
        latency_us = (steps - outside) * self.inside.hop_us + outside * self.between.hop_us
        return steps / devices * size / (slowest * 1e9) + latency_us / 1e6

    def exchange_s(self, summed: int, gathered: int, devices: int) -> float:
        """Seconds to sum `summed` bytes and then, where there are any, to gather `gathered`, the second half of what a sum takes."""
        return self.all_reduce_s(summed, devices) + (self.all_reduce_s(gathered, devices) / 2 if gathered else 0)


def step_ms(measured: Mapping[int, float], batch: float) -> tuple[float, bool]:
    """Milliseconds of a step of `batch` photos on one device, and whether that is only an upper bound.

    Between two measured batches the time lies on the line between them. Below the smallest nothing is known but that it does
    not take longer. Raises `UserError` above the largest.
    """
    batches = sorted(measured)
    if batch > batches[-1]:
        raise UserError(f"no step of {batch:g} photos was measured, the largest has {batches[-1]}: measure it with "
                        "benchmarks.step_time --batch")
    if batch <= batches[0]:
        return measured[batches[0]], batch < batches[0]
    high = bisect_left(batches, batch)
    low, high = batches[high - 1], batches[high]
    share = (batch - low) / (high - low)
    return (1 - share) * measured[low] + share * measured[high], False


def duration(seconds: float) -> str:
    """Days from two days on, hours from two hours on, else minutes or seconds."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{short(seconds / length)} {unit}"
    return f"{short(seconds)} s"


@dataclass(frozen=True)
class Schedule:
    """The phases of a training: how many steps of which kind, of how many photos. exchanged: (kind, photos over all devices) → the
    bytes that a step sums over devices and those that it gathers."""

    steps: dict[str, int]
    batch: int
    exchanged: Callable[[str, int], tuple[int, int]]


def schedule(of: Settings) -> Schedule:
    """That of a config with im2txt's two phases."""
    return Schedule({kind: of.config.phases[number].steps for kind, number in PHASES.items()}, of.config.batch_size,
                    functools.partial(scaling.expected_bytes, of))


def on_one(measured: Mapping[str, Mapping[int, float]], plan: Schedule) -> list[dict]:
    """What the schedule takes on one device, beside 2016; JSON objects."""
    ms = {kind: step_ms(measured[kind], plan.batch)[0] for kind in plan.steps}
    then = [{kind: 1000 * seconds for kind in plan.steps} for seconds in THEN_S.values()]
    found = []
    for who, times in zip(("measured", *THEN_S), (ms, *then)):
        phase_s = {kind: plan.steps[kind] * times[kind] / 1000 for kind in plan.steps}
        found.append({"who": who, "step_ms": times, "phase_s": phase_s, "total_s": sum(phase_s.values()),
                      "published_is": None if who == "measured" else "seconds a step; the total is that times the steps"})
    return found


def simulate(measured: Mapping[str, Mapping[int, float]], plan: Schedule, devices: int, ring: Ring,
             per_device: int | None) -> dict:
    """What the schedule would take on `devices`; a JSON object.

    per_device: photos a device, the whole batch growing with the devices and the steps becoming fewer by as much, for the same
    number of photos (another training). None: the batch of the schedule is cut over the devices (the same training).
    """
    batch = per_device * devices if per_device else plan.batch
    share = batch / devices
    result = {"simulated": True, "devices": devices, "batch": batch, "per_device": share, "same_training": batch == plan.batch}
    if batch % devices:
        return result | {"impossible": f"{batch} photos cannot be cut over {devices} devices"}
    phases = {}
    for kind, steps in plan.steps.items():
        compute_ms, bound = step_ms(measured[kind], share)
        summed, gathered = plan.exchanged(kind, batch)
        exchange_ms = 1000 * ring.exchange_s(summed, gathered, devices) if devices > 1 else 0.0
        count = math.ceil(steps * plan.batch / batch)
        phases[kind] = {"steps": count, "compute_ms": compute_ms, "upper_bound": bound, "exchange_ms": exchange_ms,
                        "summed_bytes": summed, "gathered_bytes": gathered, "seconds": count * (compute_ms + exchange_ms) / 1000}
    return result | {"phases": phases, "total_s": sum(phase["seconds"] for phase in phases.values())}


def rows_of_one(found: list[dict], device: str) -> list[list[str]]:
    """The table of what was measured and published."""
    lines = [["", "frozen, ms a step", "joint, ms a step", "phase 1", "phase 2", "in all"]]
    for r in found:
        who = device if r["who"] == "measured" else f"{r['who']} (arithmetic)"
        lines.append([who, *(short(r["step_ms"][kind]) for kind in PHASES), *(duration(r["phase_s"][kind]) for kind in PHASES),
                      duration(r["total_s"])])
    return lines


def rows_of_many(found: list[dict], alone_s: float) -> list[list[str]]:
    """The table of what was simulated."""
    lines = [["devices", "batch", "a device", "training", "frozen: compute + exchange, ms", "joint: compute + exchange, ms",
              "in all", "× one device"]]
    for r in found:
        line = [str(r["devices"]), f"{r['batch']:,}", f"{r['per_device']:g}", "the same" if r["same_training"] else "CHANGED"]
        if "impossible" in r:
            lines.append([*line, *["–"] * 4])
            continue
        parts = [("≤ " if phase["upper_bound"] else "") + f"{short(phase['compute_ms'])} + {short(phase['exchange_ms'])}"
                 for phase in r["phases"].values()]
        lines.append([*line, *parts, duration(r["total_s"]), short(alone_s / r["total_s"], " ×")])
    return lines


def newest(directory: Path) -> Path:
    """The latest file in `directory` that `read` accepts, by the date within. Raises `UserError` if there is none."""
    dated = []
    for path in directory.glob("*.json"):
        with contextlib.suppress(UserError):  # of another benchmark, or of other steps
            dated.append((read(path)[0]["machine"]["date"], path))
    if not dated:
        raise UserError(f"{directory} has no result of benchmarks.step_time with frozen and joint steps: name a FILE.json")
    return max(dated)[1]


def read(path: Path) -> tuple[dict, Settings, dict[str, dict[int, float]]]:
    """A file of `benchmarks.step_time`: all of it, its settings, and kind → batch → ms.

    Raises `UserError` where the steps are not im2txt's, or a kind of step at the schedule's batch is missing.
    """
    result = step_time.read(path)
    try:
        settings = result["settings"]
        of = Settings(configs.from_dict(settings["config"]), settings["vocabulary"], settings["tokens"])
        measured = {kind: {r["batch"]: r["ms"]["median"] for r in result["results"] if r["kind"] == kind and "ms" in r}
                    for kind in PHASES}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by benchmarks.step_time --json ({error})") from error
    if changed := not_im2txt(of):
        raise UserError(f"{path} has steps that are not im2txt's, whose schedule is projected ({'; '.join(changed)}): measure without "
                        "--tiny and without settings of your own")
    for kind, times in measured.items():
        if of.config.batch_size not in times:
            raise UserError(f"{path} has no {kind} step of {of.config.batch_size} photos; measure it with: python -m "
                            f"benchmarks.step_time --kinds {' '.join(PHASES)} --batch {of.config.batch_size} --json FILE")
    return result, of, measured


def not_im2txt(of: Settings) -> list[str]:
    """The settings in which steps are not those of configs/im2txt.py, a line each; their dtype and parallel mode may be any."""
    page = workload.settings(dtype=of.config.encoder.dtype, parallel=of.config.parallel)
    config = configs.change(page.config, {"encoder.weights": of.config.encoder.weights})  # they are random all the same
    sizes = {"vocabulary": (page.vocabulary, of.vocabulary), "tokens": (page.tokens, of.tokens)}
    return configs.differences(config, of.config) + [f"{key}: {a} → {b}" for key, (a, b) in sizes.items() if a != b]


def link(name: str, arguments: argparse.Namespace) -> Link:
    """A link of the table, with what the command line says instead."""
    return Link(arguments.gb_per_s or LINKS[name].gb_per_s,
                LINKS[name].hop_us if arguments.hop_us is None else arguments.hop_us)


def main(argv: Sequence[str] | None = None) -> int:
    table = "\n".join(f"  {name:15} {value.gb_per_s:6g} GB/s {value.hop_us:6g} µs" for name, value in LINKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.projection", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Takes the measured steps of benchmarks.step_time and says what im2txt's training costs on that device\n"
                    "(1,000,000 steps with a frozen encoder, 2,000,000 of everything, of 32 photos), beside 2016: the published\n"
                    "seconds a step times the same steps, which is arithmetic and not a published total.\n\n"
                    "Then it simulates many such devices: measured compute for what a device gets of the batch, and a ring\n"
                    "all-reduce of the bytes that a step sums (and a gathering of the rows of few words), as benchmarks.scaling\n"
                    "counts them in the program. Once with the batch kept (the same training) and once with it growing (fewer\n"
                    "steps: another training).",
        epilog=f"links, one direction, and latency a hop:\n{table}\n\n"
               "examples:\n"
               "  python -m benchmarks.projection\n"
               "  python -m benchmarks.projection out/steps.json --devices 8 16 --inside nvlink4\n"
               "  python -m benchmarks.projection --gb-per-s 100 --hop-us 5 --json projection.json\n")
    parser.add_argument("steps", nargs="?", type=Path, metavar="FILE.json",
                        help="of benchmarks.step_time --json, on one device (default: the newest in benchmarks/records/)")
    parser.add_argument("--devices", nargs="+", type=timing.count, default=list(DEVICES), metavar="N",
                        help="to simulate (default: 8 64 512)")
    parser.add_argument("--per-device", nargs="+", type=timing.count, metavar="B",
                        help="photos a device where the batch grows (default: every measured batch)")
    parser.add_argument("--inside", choices=LINKS, default="nvlink4", help="link within a machine (default: nvlink4)")
    parser.add_argument("--between", choices=LINKS, default="infiniband-ndr",
                        help="link between machines (default: infiniband-ndr)")
    parser.add_argument("--together", type=timing.count, default=8, metavar="N", help="devices in a machine (default: 8)")
    parser.add_argument("--gb-per-s", type=timing.amount, metavar="X", help="bandwidth of all links instead")
    parser.add_argument("--hop-us", type=float, metavar="X", help="latency of all hops instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    arguments = parser.parse_args(argv)
    if arguments.hop_us is not None and not 0 <= arguments.hop_us < math.inf:
        raise UserError(f"--hop-us must be a finite number that is not negative, not {arguments.hop_us}")

    path = arguments.steps or newest(RECORDS)
    steps, of, measured = read(path)
    plan, about = schedule(of), steps["machine"]
    file = timing.ResultFile(arguments.json, f"projection of {steps['title']}")
    file.result |= {"machine": about, "steps": path.name}
    alone = on_one(measured, plan)
    file.result["results"] += alone
    first = rows_of_one(alone, about["device"])
    counts = " + ".join(f"{count:,} {kind}" for kind, count in plan.steps.items())
    print(f"im2txt's schedule, {counts} steps of {plan.batch} photos, by {path.name}\n{timing.describe(about)}\n\n"
          f"{timing.table(first)}\n"
          f"arithmetic: the published seconds a step ({', '.join(f'{who} {s} s' for who, s in THEN_S.items())}) times all "
          f"{sum(plan.steps.values()):,} steps; nobody published the totals", flush=True)
    if about["devices"] != 1:
        print(f"\nnothing is simulated: {path} was measured on {about['devices']} devices, which have exchanged already; "
              "measure on one")
        file.save(first, finished=True)
        return 0

    ring = Ring(link(arguments.inside, arguments), link(arguments.between, arguments), arguments.together)
    sizes = arguments.per_device or sorted(set(measured["frozen"]) & set(measured["joint"]))
    found = [simulate(measured, plan, devices, ring, size) for size in (None, *sizes) for devices in arguments.devices]
    file.result["ring"] = dataclasses.asdict(ring)
    file.result["results"] += found
    print(f"\nSIMULATED, not measured: many of {about['device']}\n{timing.table(rows_of_many(found, alone[0]['total_s']))}\n"
          + "\n".join(assumptions(found, plan, ring, measured)))
    file.save(first, finished=True)
    return 0


def assumptions(found: list[dict], plan: Schedule, ring: Ring, measured: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Under what conditions the simulation holds, a line each."""
    sizes = {kind: sorted({plan.exchanged(kind, r["batch"])[0] for r in found}) for kind in plan.steps}
    sums = ", ".join(f"{' or '.join(f'{size / 1e6:,.1f}' for size in each)} MB {kind}" for kind, each in sizes.items())
    lines = [
        "assumed: every device as fast as the measured one, fed without waiting; nothing waits for the slowest of them",
        f"assumed: one ring all-reduce a step ({sums}: less where the rows of few words are gathered instead), after the "
        "computation and not hidden behind it",
        f"assumed: {ring.inside.gb_per_s:g} GB/s and {ring.inside.hop_us:g} µs a hop within a machine of {ring.together}, "
        f"{ring.between.gb_per_s:g} GB/s and {ring.between.hop_us:g} µs between machines",
        "CHANGED: a larger batch and as many photos in fewer steps; whether that trains as well is another question, which "
        "needs at least another learning rate",
        "the same: but for batch norm, which in phase 2 takes its statistics from the photos of its own device",
    ]
    if any(phase["upper_bound"] for r in found for phase in r.get("phases", {}).values()):
        smallest = min(min(times) for times in measured.values())
        lines.append(f"≤: fewer photos a device than the smallest measured batch ({smallest}), whose time is taken, an upper "
                     "bound; benchmarks.step_time --batch measures smaller ones")
    lines += [f"–: {r['impossible']}" for r in found if "impossible" in r]
    return lines


if __name__ == "__main__":
    run_command(main)

"""The two children, what is asked of them in which order, and what is made of the answers. Imports neither library."""

import functools
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.child import Child

# How far two libraries may be apart in the loss and in the norm of every gradient, with nothing random: (loss, decoder, encoder).
# The encoder's gradient under batch statistics is ill-conditioned at random weights: measured once, in float32, PyTorch was
# 5e-4 and with channels last 9e-4 from PyTorch in float64, and jaxcap 4e-4.
LIMITS = {
    "float32": (1e-4, 1e-4, 5e-3),
    "tf32": (1e-2, 5e-2, 0.5),
    "bfloat16": (8e-2, 4e-1, 0.5),
}


def apart(found: dict[str, float], reference: dict[str, float]) -> dict[str, float]:
    """|found / reference − 1| of the loss and of every gradient's norm; infinite where one is missing or not finite."""
    errors = {name: abs(found.get(name, math.inf) / value - 1) if value else math.inf for name, value in reference.items()}
    return {name: error if math.isfinite(error) else math.inf for name, error in errors.items()}


def disagreement(errors: dict[str, float], arithmetic: str) -> str:
    """What is further apart than `LIMITS` allow, the worst first; empty where all agree."""
    loss, decoder, encoder = LIMITS[arithmetic]
    allowed = dict.fromkeys(errors, decoder) | {"loss": loss}
    if "encoder" in errors:
        allowed |= {"encoder": encoder, "gradient": encoder}
    over = sorted((name for name in errors if not errors[name] <= allowed[name]), key=lambda name: -errors[name] / allowed[name])
    return ", ".join(f"{name} by {errors[name]:.1e}" for name in over)


def pair_by_pair(jaxcap: Sequence[float], peer: Sequence[float]) -> dict:
    """The ratio jaxcap ÷ peer of every turn: median, least, most, all. Below 1 jaxcap is the faster one."""
    ratios = [one / other for one, other in zip(jaxcap, peer, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "turns": ratios}


class FormError(Exception):
    """What went wrong in a form of the peer's step, in the words of its library."""


class Comparison:
    """Both children with the same captioner, ready to measure. Raises `UserError` as they do.

    about: versions, platform and sizes, for people and for the result file.
    """

    def __init__(self, directory: Path, *, peer: str, jaxcap_python: str, peer_python: str, tiny: bool, dtype: str):
        self._directory, self._dtype = directory, dtype
        self._peer_process = peer, peer_python, directory, {}
        self._peer, self._jaxcap = Child(*self._peer_process), None
        try:
            library = self._peer.ask("hello")  # first, for it is the one that may be missing
            self._jaxcap = Child("jaxcap", jaxcap_python, directory, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
            jax = self._jaxcap.ask("hello")
            self.platform = jax["platform"]
            self.about = {"jax": jax["version"], "peer": peer, "peer_version": library["version"], "platform": self.platform,
                          **self._jaxcap.ask("settings", tiny=tiny, dtype=dtype),
                          **self._peer.ask("settings", platform=self.platform),
                          "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
                          "compilation_cache": "JAX_COMPILATION_CACHE_DIR" in os.environ}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for child in filter(None, (self._peer, self._jaxcap)):
            child.close()

    def measure(self, kind: str, batch: int, forms: list[str], *, turns: int, turn_s: float, limit_s: int,
                say: Callable[[str], None]) -> Iterator[list[dict]]:
        """Yields, whenever more is known, a JSON object a form: whether it agrees with jaxcap and, if so, the times of all turns.

        A form takes its turns with jaxcap as soon as it is ready: one that compiles for long, or fails, leaves the others' times
        alone. Raises `RuntimeError` where jaxcap's own step cannot be taken.
        """
        say(f"{kind}, batch {batch}: what jaxcap computes …")
        reference = self._jaxcap.ask("agree", kind=kind, batch=batch)
        prepared = self._jaxcap.ask("prepare", kind=kind, batch=batch)
        jaxcap_ready_s, together = prepared["ready_s"], prepared["together"]
        at_once = f", {together} steps a dispatch" if together > 1 else ""
        say(f"  jaxcap ready in {jaxcap_ready_s:.1f} s{at_once}; its loss is {reference['loss']:.6f} with nothing random")
        arithmetic = "bfloat16" if self._dtype == "bfloat16" else "float32" if self.platform == "cpu" else "tf32"
        wrong = ""
        if arithmetic != "float32":  # whatever is timed, in full float32 both are the same
            found = self._peer.ask("agree", kind=kind, batch=batch)
            wrong = disagreement(apart(found, reference), "float32")
        results = [{"kind": kind, "batch": batch, "dtype": self._dtype, "form": form, "reference": _json(reference),
                    "jaxcap_ready_s": jaxcap_ready_s, "jaxcap_steps_per_dispatch": together} for form in forms]
        for result in results:
            yield results
            try:
                result |= self._check(kind, batch, result["form"], limit_s, reference, arithmetic, wrong)
                say(f"  {result['form']}: {result.get('error') or 'agrees, ready in {:.1f} s'.format(result['peer_ready_s'])}")
                yield results
                if "error" not in result:
                    for _ in self._time(result, turns, turn_s):
                        yield results
                self._peer.ask("forget")
            except FormError as error:
                result["error"] = str(error)
                say(f"  {result['form']}: {error}")
                self._renew_peer()
        yield results
        (self._directory / f"{kind}-{batch}.npz").unlink()

    def _check(self, kind: str, batch: int, form: str, limit_s: int, reference: dict, arithmetic: str, wrong: str) -> dict:
        answer = self._ask_form("prepare", kind=kind, batch=batch, form=form, limit_s=limit_s)
        errors = apart(answer["found"], reference)
        gradients = [error for name, error in errors.items() if name != "loss"]
        result = {"found": _json(answer["found"]), "peer_ready_s": answer["ready_s"], "loss_apart": _finite(errors["loss"]),
                  "gradient_apart": _finite(max(gradients)) if gradients else None}
        if "lstm_dtype" in answer:
            result["peer_lstm_dtype"] = answer["lstm_dtype"]
        if wrong := wrong or disagreement(errors, arithmetic):
            result["error"] = f"does not agree with jaxcap: {wrong}"
        return result

    def _time(self, result: dict, turns: int, turn_s: float) -> Iterator[None]:
        """Times jaxcap and the result's form one after the other, again and again, and yields after every turn; each begins with
        the side that ended the one before."""
        ask = {"jaxcap": functools.partial(self._jaxcap.ask, "time"),
               "peer": functools.partial(self._ask_form, "time", form=result["form"])}
        calls = {}
        for side in ask:
            ask[side](calls=1)
            calls[side] = max(round(1000 * turn_s / ask[side](calls=1)["ms"]), 1)
        result["steps_per_turn"] = calls
        times = {side: [] for side in ask}
        for turn in range(turns):
            for side in reversed(ask) if turn % 2 else ask:
                times[side].append(ask[side](calls=calls[side]))
            for what in ("ms", "cpu_ms"):
                found = {side: [time[what] for time in times[side]] for side in ask}
                result[what] = {**found, "ratio": pair_by_pair(**found)}
            yield

    def _ask_form(self, do: str, **arguments: Any) -> dict:
        try:
            return self._peer.ask(do, **arguments)
        except RuntimeError as error:
            raise FormError(str(error)) from error

    def _renew_peer(self) -> None:
        """Gives the peer a new process: a form that failed may have ended the old one, or left its device without memory."""
        self._peer.close()
        self._peer = Child(*self._peer_process)
        self._peer.ask("hello")
        self._peer.ask("settings", platform=self.platform)


def _json(found: dict[str, float]) -> dict[str, float | str]:
    """What was computed as JSON can say it: "nan" and "inf" in words."""
    return {name: number if math.isfinite(number) else str(number) for name, number in found.items()}


def _finite(number: float) -> float:
    return number if math.isfinite(number) else 1e300

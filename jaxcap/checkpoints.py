"""Checkpoints of a run: parameters, statistics, optimizer, RNG and position in the data. The only file that imports orbax.

Written in the background, whole or not at all; the newest few are kept, and the best by score.
"""

import shutil
import sys
import textwrap
import time
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from jaxcap import config as configs
from jaxcap.errors import UserError, free_or
from jaxcap.step import TrainState

PyTree = Any
# orbax warns of every checkpoint that was not scored, and its threads show a traceback of what `_guard` says in words, as asyncio does.
logging.set_verbosity(logging.FATAL)
getLogger("asyncio").setLevel(CRITICAL)
# Left to itself orbax cuts what several devices hold alike into a share for each while training waits: a program of its own for every cut.
ocp.type_handlers.register_type_handler(jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False), override=True)
_shown = sys.unraisablehook
_SHARE, _DIRECTORIES = 1.2, 2 << 20  # of a checkpoint on disk: over its arrays, and bytes besides them
_ECHOES = ("Event loop is closed", "Encountered error while reading array index")  # how errors of tensorstore's threads after the first begin
_PLACES = ("step", "phase", "phase_step", "words")  # numbers that every position has


def _unraisable(what: Any) -> None:
    """Shows an error that nothing can catch, but for tensorstore's: after one failure its other threads call a loop that has ended, or
    what they read has nobody to go to."""
    if not str(what.exc_value).startswith(_ECHOES):
        _shown(what)


sys.unraisablehook = _unraisable


class Checkpoints:
    """The checkpoints in `directory`.

    Args:
      directory: made if need be.
      settings: how many are kept, and by which score the best is chosen.
      read_only: nothing is made, removed or tidied, so that a run can be read while it is trained.
    """

    def __init__(self, directory: Path, settings: configs.Checkpoints, *, read_only: bool = False):
        best = checkpoint_managers.BestN(get_metric_fn=lambda scores: scores[settings.best], n=1,
                                         keep_checkpoints_without_metrics=False)
        policy = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(settings.keep), best])
        self._directory, self._best = directory, settings.best
        try:
            self._manager = ocp.CheckpointManager(
                directory.absolute(), item_names=("model", "train", "position"),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=None if read_only else policy, best_fn=lambda scores: scores[settings.best],
                    create=not read_only, cleanup_tmp_directories=not read_only, read_only=read_only,
                    save_interval_steps=0 if read_only else 1))
            scores = {step: self._manager.metrics(step) for step in self.steps()}
        except OSError as error:
            raise UserError(f"cannot keep checkpoints in {directory}: {error}") from error
        except (ValueError, RecursionError) as error:  # orbax reads every checkpoint's scores
            raise UserError(f"a score file, */metrics/metrics in {directory}, is not valid JSON ({error}); "
                            "delete the checkpoint that it belongs to") from error
        for step, found in scores.items():
            self._check_scores(step, found)

    def steps(self) -> list[int]:
        """Steps that can be restored, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the highest score, the newest one where nothing was scored, None where there is none."""
        scored = self._manager.best_step()
        return self._manager.latest_step() if scored is None else scored

    def save(self, state: TrainState, position: dict, scores: dict[str, float] | None = None) -> None:
        """Begins to write a checkpoint; the arrays are copied off the devices before this returns.

        Raises `UserError` if the disk has no room for it, or if the previous write failed: older checkpoints are whole.
        """
        step = int(state.step)
        self._guard(lambda: self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state))))
        metrics = {self._best: float(scores[self._best])} if scores else None
        items = ocp.args.Composite(
            model=ocp.args.StandardSave({"params": state.params, "batch_stats": state.batch_stats}),
            train=ocp.args.StandardSave({"opt_state": state.opt_state, "rng": state.rng, "step": state.step}),
            position=ocp.args.JsonSave(position))
        self._guard(lambda: self._manager.save(step, args=items, metrics=metrics, force=True))

    def wait(self) -> None:
        """Returns when everything is on disk. Raises as `save` does."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits and frees what orbax holds."""
        self.wait()
        self._manager.close()

    def position(self, step: int) -> dict:
        """What `save` was given as `position`."""
        position = self._restore(step, ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]
        if not isinstance(position, dict) or not all(isinstance(position.get(key), int) for key in _PLACES):
            raise self._unreadable(step, f"position/metadata lacks one of {', '.join(_PLACES)}")
        return position

    def restore_model(self, step: int, like: PyTree) -> PyTree:
        """`{"params", "batch_stats"}` of a checkpoint, shaped and placed as `like` (arrays or ShapeDtypeStructs)."""
        return self._restore_like(step, model=like)["model"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The whole training state, shaped and placed as `like`."""
        model = {"params": like.params, "batch_stats": like.batch_stats}
        train = {"opt_state": like.opt_state, "rng": like.rng, "step": like.step}
        restored = self._restore_like(step, model=model, train=train)
        return TrainState(**restored["model"], **restored["train"])

    def _restore_like(self, step: int, **items: PyTree) -> PyTree:
        try:
            return self._restore(step, ocp.args.Composite(
                **{item: ocp.args.StandardRestore(_abstract(like)) for item, like in items.items()}))
        except UserError:
            for item, like in items.items():
                if found := difference(self._shapes(step, item), like):
                    name, there, here = found
                    raise UserError(
                        f"{self._directory.parent / 'config.json'} does not describe the checkpoint {self._directory / str(step)}: {name} is "
                        f"{there} there and {here} by config.json; put back the config.json that the run was trained with") from None
            raise

    def _shapes(self, step: int, item: str) -> PyTree:
        """What a checkpoint says of its arrays; None where that cannot be read either."""
        try:
            return ocp.StandardCheckpointHandler().metadata((self._directory / str(step) / item).absolute()).tree
        except Exception:  # as in `_restore`
            return None

    def _restore(self, step: int, arguments) -> PyTree:
        try:
            return self._manager.restore(step, args=arguments)
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged directory
            time.sleep(0.5)  # tensorstore's other reads end before Python does
            raise self._unreadable(step, _reason(error)) from error

    def _unreadable(self, step: int, reason: str) -> UserError:
        others = [s for s in self.steps() if s != step]
        hint = f"delete it to go on from step {others[-1]}" if others else "there is no other one"
        return UserError(f"checkpoint {self._directory / str(step)} cannot be read ({reason}); {hint}")

    def _check_scores(self, step: int, scores: Any) -> None:
        """Raises `UserError` where a checkpoint that was scored has no number by which it could be the best."""
        if scores is None or isinstance(scores, dict) and isinstance(scores.get(self._best), int | float):
            return
        file = self._directory / str(step) / "metrics" / "metrics"
        if isinstance(scores, dict) and scores and self._best not in scores:
            raise UserError(f"{file} holds {', '.join(scores)}, not {self._best}; set checkpoints.best in the run's config.json to a score "
                            "that it was trained with")
        raise UserError(f"a score file, {file}, holds no {self._best} that is a number; delete the checkpoint that it belongs to")

    def _check_room(self, needed: int) -> None:
        # orbax finds a full disk out in its background threads, when most is written.
        needed = _SHARE * needed + _DIRECTORIES
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise OSError(f"{needed / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free")

    def _guard(self, write) -> None:
        try:
            write()
        except Exception as error:
            if not self._manager.is_saving_in_progress():  # what is still written may become whole
                self._remove_halves()
            last = [s for s in self.steps() if (self._directory / str(s)).is_dir()]
            kept = f"the last good one is step {last[-1]}" if last else "none was written before"
            raise UserError(f"a checkpoint could not be written to {self._directory} ({_reason(error)}); {kept}; "
                            f"{free_or('move the run to where it can be written', error)} and resume") from error

    def _remove_halves(self) -> None:
        if halves := list(self._directory.glob("*.orbax-checkpoint-tmp")):
            time.sleep(0.5)  # tensorstore's other writes into them end
        for half in halves:
            shutil.rmtree(half, ignore_errors=True)


def difference(theirs: PyTree, ours: PyTree) -> tuple[str, str, str] | None:
    """The first array, by name, that two models or training states do not share in its shape: its name, and its shape in each, or "absent".

    None where all are alike, or nothing is known of theirs.
    """
    there, here = ({jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
                    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (theirs, ours))
    for name in sorted(there | here) if there else ():
        if there.get(name) != here.get(name):
            return name.removeprefix("params/"), str(there.get(name, "absent")), str(here.get(name, "absent"))
    return None


def _reason(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0].partition(" See full TensorStore details")[0].rstrip(".")
    return textwrap.shorten(first, 200, placeholder=" …") or type(error).__name__


def _abstract(tree: PyTree) -> PyTree:
    def describe(x):
        return x if isinstance(x, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(describe, tree)

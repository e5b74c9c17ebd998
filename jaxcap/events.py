"""TensorBoard's event files, by tensorboardX, which is imported with the first of them and without PyTorch."""

import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path


class EventFile:
    """A new event file in `directory`. Raises `OSError`, as its methods do, where it cannot be written."""

    def __init__(self, directory: Path):
        with _hidden("torch"):
            from tensorboardX import RecordWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        self._event, self._summary = event_pb2, summary_pb2
        # Not a `SummaryWriter`: its thread dies of a full disk, and then whoever writes waits for it for ever.
        self._records = RecordWriter(str(directory / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"))
        self._write(file_version="brain.Event:2")

    def restart(self, step: int) -> None:
        """Has TensorBoard drop what it knows of `step` and later ones from earlier files."""
        self._write(step=step, session_log=self._event.SessionLog(status=self._event.SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of a step, by the tags that TensorBoard shows them under."""
        summary = self._summary.Summary
        self._write(step=step, summary=summary(value=[summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, **what) -> None:
        self._records.write(self._event.Event(wall_time=time.time(), **what).SerializeToString())


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Keeps what is imported meanwhile from importing `module`, unless that is there already.

    tensorboardX loads PyTorch for the name of a type: two seconds, and CUDA's libraries in other versions than JAX's.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None
    try:
        yield
    finally:
        del sys.modules[module]

"""Keras's side, on TensorFlow."""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # what it says as it starts is of no interest here

import keras
import tensorflow as tf

from benchmarks.peers import forms
from benchmarks.peers.keras_step import Step
from benchmarks.peers.peer_side import PeerSide
from jaxcap import memory
from jaxcap.errors import UserError


class Side(PeerSide):
    """`PeerSide` with Keras."""

    def hello(self) -> dict:
        tf.get_logger().setLevel("ERROR")  # a function for every form is meant
        return {"version": f"{keras.__version__} (TensorFlow {tf.__version__})"}

    def settings(self, *, platform: str) -> dict:
        """Reads the captioner that jaxcap's side left, and chooses the device: that of jaxcap."""
        if platform not in ("cpu", "gpu"):
            raise UserError(f"jaxcap runs on a {platform} here, Keras cannot: compare on a CPU (JAX_PLATFORMS=cpu) or a GPU")
        gpus = tf.config.list_physical_devices("GPU")
        if platform == "gpu" and not gpus:
            raise UserError("jaxcap runs on a GPU that this TensorFlow cannot use: install tensorflow[and-cuda], or set "
                            "JAX_PLATFORMS=cpu")
        tf.config.set_visible_devices(gpus if platform == "gpu" else [], "GPU")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        self._read()
        return {"threads": memory.cores()}

    def forget(self) -> dict:
        super().forget()
        keras.backend.clear_session()
        return {}

    def _step(self, kind: str, batch: int, form: str, dtype: str) -> Step:
        return Step(kind, forms.parse("keras", form), {**self._described, "dtype": dtype}, self._arrays, self._inputs(kind, batch))

    def _wait(self) -> None:
        tf.test.experimental.sync_devices()

    def _precise(self, precise: bool) -> None:
        tf.config.experimental.enable_tensor_float_32_execution(not precise)

"""A short training to a score, without any data set: `python -m benchmarks.training`.

The photos are drawn here: a block of one of eight colours at one of nine places, and the caption says which. A captioner
that trains as it should writes nearly all captions of unseen photos word for word.
"""

import argparse
import dataclasses
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import short
from jaxcap import captioner as captioners
from jaxcap import config as configs
from jaxcap import inference, optim, resident, vocab
from jaxcap import step as steps
from jaxcap.config import Config
from jaxcap.data import augment
from jaxcap.errors import run_command
from jaxcap.parallel import Parallel
from jaxcap.step import Batch, TrainState

SIZE, WORDS = 32, 8
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 80, 220), "yellow": (250, 220, 40),
           "black": (20, 20, 20), "white": (250, 250, 250), "purple": (130, 50, 190), "orange": (250, 130, 20)}
PLACES = ("top left", "top middle", "top right", "middle left", "centre", "middle right", "bottom left", "bottom middle",
          "bottom right")
GOAL = 0.95  # of the captions word for word


def draw(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """uint8 [count, SIZE, SIZE, 3] and a caption of each."""
    random = np.random.default_rng(seed)
    image_BHWC = random.integers(90, 170, (count, SIZE, SIZE, 3), np.uint8)
    captions = []
    for image_HWC in image_BHWC:
        colour, place = random.choice(list(COLOURS)), random.integers(9)
        side = random.integers(6, 10)
        row, column = (part * 10 + 1 + random.integers(0, 10 - side + 1) for part in divmod(place, 3))
        image_HWC[row:row + side, column:column + side] = COLOURS[colour]
        captions.append(f"a {colour} block at the {PLACES[place]}")
    return image_BHWC, captions


def train(config: Config, count: int, total: int, devices: Parallel) -> dict:
    """Trains on `count` photos for `total` steps and captions 256 others; a JSON object."""
    start = time.perf_counter()
    image_NHWC, captions = draw(count, seed=1)
    words = vocab.build(captions, min_count=1)
    tokens_NT1 = vocab.pad([words.encode(caption, WORDS + 1) for caption in captions], WORDS + 2)
    captioner, phase = captioners.build(config, len(words)), config.phases[0]
    optimizer = optim.optimizer(phase.optim, optim.schedule(phase.optim, total, total))
    key = jax.random.PRNGKey(config.seed)
    params, batch_stats = jax.jit(captioner.init, static_argnums=1)(key, SIZE)
    opt_state = jax.jit(optimizer.init)(params)
    state = devices.replicate(TrainState(jnp.int32(0), params, batch_stats, opt_state, jax.random.fold_in(key, 1)))
    step = devices.wrap(functools.partial(steps.train_step, captioner=captioner, phase=phase, optimizer=optimizer,
                                          augment=augment.augmentation(config.augment, SIZE)),
                        in_sharded=(False, True, False), donate=(0,))
    table, random = devices.replicate(resident.table(image_NHWC, captioner.platform)), np.random.default_rng(2)
    for done in range(total):
        rows = random.integers(0, count, config.batch_size).astype(np.int32)
        state, metrics = step(state, devices.hand(Batch(tokens_BT1=tokens_NT1[rows], index_B=rows)), table)
        if done == 0:
            first_loss, ready = float(metrics.loss), time.perf_counter()
    loss, trained = float(metrics.loss), time.perf_counter()

    decode = inference.decoder(captioner, config.search, SIZE, devices)
    image_NHWC, captions = draw(256, seed=3)
    look = devices.replicate(inference.look(captioner, state.params, state.batch_stats))
    written = inference.captions(decode, state.params, look, words, devices, inference.rows(image_NHWC, 64))
    right = np.mean([found[0].text == caption for found, caption in zip(written, captions, strict=True)])
    return {"steps": total, "loss": [first_loss, loss], "captions_right": float(right), "compile_s": ready - start,
            "train_s": trained - ready, "step_ms": 1000 * (trained - ready) / (total - 1) if total > 1 else None,
            "total_s": time.perf_counter() - start}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description="Trains the small CNN and an LSTM from scratch on photos drawn on the spot and says how many captions of "
                    f"unseen ones are right word for word. Exit status 1 below {GOAL:.0%}.")
    parser.add_argument("--steps", type=timing.count, default=600, help="optimizer steps of 64 photos (default: 600)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--tiny", action="store_true", help="a few steps; only asks that the loss falls")
    arguments = parser.parse_args(argv)
    timing.initialize()
    shapes = configs.SHAPES
    config = dataclasses.replace(shapes, batch_size=64, phases=shapes.phases[-1:],
                                 data=dataclasses.replace(shapes.data, size=SIZE, max_words=WORDS),
                                 decoder=dataclasses.replace(shapes.decoder, embedding=64, hidden=128))
    file = timing.ResultFile(arguments.json, "training to a score")
    print(timing.describe(file.result["machine"]), flush=True)
    total = 20 if arguments.tiny else arguments.steps
    result = train(config, 512 if arguments.tiny else 4096, total, Parallel(config.parallel))
    first, last = result["loss"]
    file.result["ok"] = bool(last < first if arguments.tiny else result["captions_right"] >= GOAL)
    file.result["results"].append(result)
    rows = [["captions right", "goal", "steps", "loss", "ms a step", "compile", "training", "in all"],
            [f"{result['captions_right']:.1%}", "–" if arguments.tiny else f"{GOAL:.0%}", str(total),
             f"{first:.2f} → {last:.3f}", short(result["step_ms"]), short(result["compile_s"], " s"),
             short(result["train_s"], " s"), short(result["total_s"], " s")]]
    print("\n" + timing.table(rows))
    file.save(rows, finished=True)
    return 0 if file.result["ok"] else 1


if __name__ == "__main__":
    run_command(main)

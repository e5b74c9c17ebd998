"""Times an LSTM over a caption's words as jaxcap scans it, in other forms and beside cuDNN's: `python -m benchmarks.recurrence`."""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import rnn

from benchmarks import timing
from benchmarks.timing import short
from jaxcap import products
from jaxcap.decoders import cells
from jaxcap.errors import UserError, run_command

FORMS = {"loop": 1, "by fours": 4, "one piece": 0}  # time steps in a round of the loop, as decoder.unroll
CUDNN, TORCH = "cuDNN", "PyTorch"
ON_ACCELERATORS = 8  # recurrences a call there, so that calling costs nothing
APART = 0.05  # of the largest value: a wrong order of gates is far above, bfloat16 and TF32 are below


class Problem(NamedTuple):
    """Words' embeddings, an LSTM's kernel over [input, hidden] and bias, and the gradient of all hidden states; float32."""

    x_TBE: np.ndarray
    kernel: np.ndarray
    bias_G: np.ndarray
    d_hidden_TBD: np.ndarray


class Answer(NamedTuple):
    """Hidden states and, unless only they were asked for, the gradients of what a Problem gives; in its order of gates."""

    hidden_TBD: Any
    d_x_TBE: Any = None
    d_kernel: Any = None
    d_bias_G: Any = None


def _reordered(gates: np.ndarray) -> np.ndarray:
    """Arrays of gates as their last axis, in cuDNN's order i, f, j, o out of im2txt's i, j, f, o, and back."""
    i, j, f, o = np.split(gates, 4, axis=-1)
    return np.concatenate([i, f, j, o], axis=-1)


def problem(words: int, batch: int, embedding: int, units: int, seed: int = 0) -> Problem:
    random = np.random.default_rng(seed)
    return Problem(random.standard_normal((words, batch, embedding), np.float32),
                   random.uniform(-0.08, 0.08, (embedding + units, 4 * units)).astype(np.float32),
                   random.uniform(-0.08, 0.08, 4 * units).astype(np.float32),
                   random.standard_normal((words, batch, units), np.float32))


def scanned(x_TBE: jax.Array, kernel: jax.Array, bias_G: jax.Array, *, unroll: int, kernel_dtype: jnp.dtype | None) -> jax.Array:
    """Hidden states [T, B, D] from the zero state as jaxcap's decoder computes them, `unroll` words in a round of its loop."""
    # The barrier is the decoder's: else XLA cuts the kernel anew for every word. All words' inputs are one axis, for of an argument's two
    # XLA for CPUs is slow at the sum that is the kernel's gradient; of what the decoder has in its place it is not.
    input_kernel, hidden_kernel = jax.lax.optimization_barrier(jnp.split(kernel.astype(kernel_dtype or kernel.dtype), [x_TBE.shape[-1]]))
    unit = cells.get("lstm")
    zero = unit.start(jnp.zeros((x_TBE.shape[1], len(hidden_kernel)), x_TBE.dtype))
    x_TBG = (products.matmul(x_TBE.reshape(-1, x_TBE.shape[-1]), input_kernel) + bias_G).reshape(*x_TBE.shape[:2], -1)
    return cells.scan(unit.step, x_TBG, hidden_kernel, None, zero, unroll)


def to_cudnn(kernel: np.ndarray, bias_G: np.ndarray, embedding: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """cuDNN's and PyTorch's W_ih [4D, E], W_hh [4D, D] and b_ih [4D] (its b_hh is zero) for an LSTM of jaxcap's, whose forget
    gate has a bias of 1 beside what is learnt."""
    kernel, bias_G = _reordered(kernel), _reordered(bias_G)
    forget_G = np.repeat(np.array([0, 1, 0, 0], bias_G.dtype), len(bias_G) // 4)
    return kernel[:embedding].T, kernel[embedding:].T, bias_G + forget_G


def from_cudnn(d_input: np.ndarray, d_hidden: np.ndarray, d_bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of jaxcap's kernel and bias out of those of cuDNN's W_ih, W_hh and b_ih."""
    return _reordered(np.concatenate([d_input.T, d_hidden.T])), _reordered(d_bias)


def packed(kernel: np.ndarray, bias_G: np.ndarray, embedding: int) -> np.ndarray:
    """`to_cudnn` as the one array that `jax.experimental.rnn` takes."""
    w_ih, w_hh, b_ih = to_cudnn(kernel, bias_G, embedding)
    return np.concatenate([w_ih.ravel(), w_hh.ravel(), b_ih, np.zeros_like(b_ih)])


def in_jaxcap(problems: list[Problem], gradients: bool, dtype: str, unroll: int) -> tuple[Callable, Callable]:
    """A compiled call that answers all problems, which have one LSTM, and how to read its result as an Answer a problem."""
    dtype, kernel_dtype = products.dtypes(dtype, jax.default_backend())
    of = functools.partial(scanned, unroll=unroll, kernel_dtype=kernel_dtype)

    def answer(x_TBE, kernel, bias_G, d_hidden_TBD):
        if not gradients:
            return Answer(of(x_TBE, kernel, bias_G))
        hidden_TBD, pull = jax.vjp(of, x_TBE, kernel, bias_G)
        return Answer(hidden_TBD, *pull(d_hidden_TBD))

    compiled = jax.jit(lambda problems: [answer(*one) for one in problems])
    given = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), problems))
    return lambda: compiled(given), lambda result: result


def in_cudnn(problems: list[Problem], gradients: bool) -> tuple[Callable, Callable]:
    """The same by `jax.experimental.rnn`, whose cuDNN takes float32 alone, multiplied as TF32. Its packed weights are given."""
    embedding, units = problems[0].x_TBE.shape[-1], problems[0].d_hidden_TBD.shape[-1]
    weights = packed(problems[0].kernel, problems[0].bias_G, embedding)

    def of(x_BTE, weights):
        zero = jnp.zeros((1, x_BTE.shape[0], units))
        lengths = jnp.full(x_BTE.shape[0], x_BTE.shape[1], jnp.int32)
        return rnn.lstm(x_BTE, zero, zero, weights, lengths, embedding, units, 1, 0.0, False)[0]

    def answer(weights, x_BTE, d_hidden_BTD):
        if not gradients:
            return of(x_BTE, weights), None, None
        hidden_BTD, pull = jax.vjp(of, x_BTE, weights)
        return hidden_BTD, *pull(d_hidden_BTD)

    compiled = jax.jit(lambda weights, given: [answer(weights, *one) for one in given])
    given = jax.device_put([(one.x_TBE.swapaxes(0, 1), one.d_hidden_TBD.swapaxes(0, 1)) for one in problems])
    weights = jax.device_put(weights)

    def read(result):
        for hidden_BTD, d_x_BTE, d_weights in result:
            found = ()
            if gradients:
                d_input, d_hidden, d_bias, _ = (np.asarray(part[0]) for part in rnn.unpack_lstm_weights(d_weights, embedding, units, 1, False))
                found = np.asarray(d_x_BTE).swapaxes(0, 1), *from_cudnn(d_input, d_hidden, d_bias)
            yield Answer(np.asarray(hidden_BTD).swapaxes(0, 1), *found)

    return lambda: compiled(weights, given), read


def in_torch(problems: list[Problem], gradients: bool, dtype: str) -> tuple[Callable, Callable]:
    """The same by `torch.nn.LSTM` (cuDNN or oneDNN), all of it in `dtype`."""
    torch, device = timing.torch_here()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as XLA takes float32 there
    embedding, units = problems[0].x_TBE.shape[-1], problems[0].d_hidden_TBD.shape[-1]

    def tensor(array: np.ndarray):
        return torch.tensor(array, dtype=getattr(torch, dtype), device=device)

    lstm = torch.nn.LSTM(embedding, units, device=device, dtype=getattr(torch, dtype))
    own = [lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0]
    with torch.no_grad():
        lstm.bias_hh_l0.zero_()
        for parameter, value in zip(own, to_cudnn(problems[0].kernel, problems[0].bias_G, embedding)):
            parameter.copy_(tensor(value))
    given = [(tensor(one.x_TBE).requires_grad_(gradients), tensor(one.d_hidden_TBD)) for one in problems]

    def call():
        result = []
        with torch.set_grad_enabled(gradients):
            for x_TBE, d_hidden_TBD in given:
                hidden_TBD, _ = lstm(x_TBE)
                result.append((hidden_TBD, torch.autograd.grad(hidden_TBD, [x_TBE, *own], d_hidden_TBD) if gradients else None))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    def read(result):
        for hidden_TBD, found in result:
            d_x_TBE, *rest = [gradient.float().cpu().numpy() for gradient in found] if found else [None]
            yield Answer(hidden_TBD.detach().float().cpu().numpy(), d_x_TBE, *(from_cudnn(*rest) if rest else ()))

    return call, read


def apart(answer: Answer, right: Answer) -> float:
    """How far the answer is from the right one: the largest difference, as a share of the largest value of that array."""

    def of(one, other):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        return float(np.abs(one - other).max() / np.abs(other).max())

    return max(of(one, other) for one, other in zip(answer, right) if other is not None)


def measure(batch: int, gradients: bool, arguments: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """Milliseconds of one recurrence by its form, a number a turn; how far each is from the loop in float32; and of those which are
    too far or fail, why."""
    together = 1 if jax.default_backend() == "cpu" else ON_ACCELERATORS
    drawn = [problem(arguments.words, batch, arguments.units, arguments.units, seed) for seed in range(together)]
    problems = [one._replace(kernel=drawn[0].kernel, bias_G=drawn[0].bias_G) for one in drawn]
    makers = {name: functools.partial(in_jaxcap, dtype=arguments.dtype, unroll=unroll) for name, unroll in FORMS.items()}
    if jax.default_backend() == "gpu":
        makers[CUDNN] = in_cudnn
    if arguments.peer:
        makers[TORCH] = functools.partial(in_torch, dtype=arguments.dtype)
    call, read = in_jaxcap(problems[:1], gradients, "float32", 1)
    with jax.default_matmul_precision("highest"):
        right = next(iter(read(call())))
    calls, distances, wrong = {}, {}, {}
    for name, make in makers.items():
        print(f"    {name} …", file=sys.stderr, flush=True)
        try:
            call, read = make(problems, gradients)
            distance = apart(next(iter(read(call()))), right)
        except UserError:
            raise
        except Exception as error:  # whatever one dies of, the others go on
            wrong[name] = str(error).partition("\n")[0]
            continue
        if distance < APART:
            calls[name], distances[name] = call, distance
        else:
            wrong[name] = f"does not compute jaxcap's LSTM: {distance:.3f} of the largest value apart, allowed are {APART}"
    turns = [{name: timing.time_calls(call, repeats=1, calls=arguments.calls).ms / together for name, call in calls.items()}
             for _ in range(arguments.turns)]
    return {name: [turn[name] for turn in turns] for name in calls}, distances, wrong


def rows(results: list[dict]) -> list[list[str]]:
    lines = [["captions", "pass", "form", "ms", "min – max of turns", "µs a word", "÷ loop, median of turns", "apart"]]
    for r in results:
        ms = statistics.median(r["turns_ms"])
        lines.append([str(r["batch"]), r["pass"], r["form"], short(ms), f"{short(min(r['turns_ms']))} – {short(max(r['turns_ms']))}",
                      short(1000 * ms / r["words"]), short(r["ratio"]), f"{r['apart']:.1e}"])
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recurrence", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Times one LSTM layer under teacher forcing by itself, forward and with the gradients of words, kernel and bias: as\n"
                    "jaxcap scans it with one word, four, or all in a round of the loop (decoder.unroll), on NVIDIA cards by cuDNN through\n"
                    "jax.experimental.rnn (float32 alone, multiplied as TF32), and with --peer by torch.nn.LSTM. Each has to give the same\n"
                    "hidden states and gradients first; all of them take part in every turn. A ratio below 1 is faster than the loop.",
        epilog="examples:\n"
               "  python -m benchmarks.recurrence --peer\n"
               "  python -m benchmarks.recurrence --dtype bfloat16 --batch 32 256 --json FILE")
    parser.add_argument("--batch", type=timing.count, nargs="+", default=[32], metavar="B", help="captions at once (default: 32)")
    parser.add_argument("--words", type=timing.count, default=20, metavar="T", help="time steps (default: 20)")
    parser.add_argument("--units", type=timing.count, default=512, metavar="D", help="of the LSTM and of its input (default: 512)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the arithmetic; on a CPU bfloat16 rounds the factors of products only")
    parser.add_argument("--turns", type=timing.count, default=5, metavar="N", help="timings of each (default: 5)")
    parser.add_argument("--calls", type=timing.count, default=0, metavar="N", help="calls a timing (default: about half a second of them)")
    parser.add_argument("--peer", action="store_true", help="compare with PyTorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    arguments = parser.parse_args(argv)
    timing.initialize()
    file = timing.ResultFile(arguments.json, f"recurrence {arguments.dtype}")
    file.result["settings"] = {name: getattr(arguments, name) for name in ("batch", "words", "units", "dtype")}
    if arguments.peer:
        file.result["omp_wait_policy"] = timing.calm_torch(file.result["machine"])
    results, file.result["wrong"] = file.result["results"], []
    print(f"LSTM of {arguments.units} units, {arguments.words} words, {arguments.dtype}\n{timing.describe(file.result['machine'])}", flush=True)
    for batch in arguments.batch:
        for what in ("forward", "with gradients"):
            print(f"  {batch} captions, {what}", file=sys.stderr, flush=True)
            turns_ms, distances, wrong = measure(batch, what != "forward", arguments)
            for form, why in wrong.items():
                print(f"    {form}: {why}", file=sys.stderr, flush=True)
            results += [{"batch": batch, "pass": what, "form": form, "words": arguments.words, "apart": distances[form], "turns_ms": ms,
                         "ratio": statistics.median(one / loop for one, loop in zip(ms, turns_ms["loop"])) if "loop" in turns_ms else None}
                        for form, ms in turns_ms.items()]
            file.result["wrong"] += [{"batch": batch, "pass": what, "form": form, "why": why} for form, why in wrong.items()]
            file.result["ok"] = not file.result["wrong"]
            file.save(rows(results))
    print("\n" + timing.table(rows(results)))
    file.save(rows(results), finished=True)
    return 0 if file.result["ok"] else 1


if __name__ == "__main__":
    run_command(main)

"""What is said of progress where stderr is no terminal."""

import io
import sys
from types import SimpleNamespace

import jax
import pytest
from tqdm import tqdm

from jaxcap import journal, parallel, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


def test_lines_have_no_control_codes_and_a_pause_between_them(clock, capsys):
    bar = progress.bar("training", 800, " steps", initial=100)
    bar.set_description("phase 1/2 words")
    for _ in range(500):
        clock.s += 0.04
        bar.set_postfix_str("loss 2.301", refresh=False)
        bar.update()
    bar.write("step 600: done", file=sys.stderr)
    bar.update(200)
    bar.close()
    bar.close()
    assert capsys.readouterr().err == ("phase 1/2 words: 350 of 800 steps, 25 steps/s, 18 s left, loss 2.301\n"
                                       "phase 1/2 words: 600 of 800 steps, 25 steps/s, 8 s left, loss 2.301\n"
                                       "step 600: done\n"
                                       "phase 1/2 words: 800 of 800 steps, 35 steps/s, loss 2.301\n")


def test_what_goes_on_inside_another_speaks_only_when_it_takes_long(clock, capsys):
    with progress.bar("training", 8, " steps"):
        for pauses in (0, 2):
            with progress.bar("captions of val", 4) as inner:
                inner.update()
                clock.s += 6 * pauses
                inner.update()
                clock.s += 1
                inner.update(2)
    with progress.bar("features of val", 4):
        pass  # nothing was to be done
    with progress.bar("reading", 1) as after:
        clock.s += 4
        after.update()
    assert capsys.readouterr().err == ("captions of val: 2 of 4 photos, 0.17 photos/s, 12 s left\n"
                                       "captions of val: 4 of 4 photos, 0.31 photos/s\n"
                                       "reading: 1 of 1 photos, 0.25 photos/s\n")


def test_a_run_s_speed_leaves_out_time_that_went_into_something_else(clock, capsys, tmp_path):
    log = journal.Journal(tmp_path, total=100)
    log.phase("words", new=True)
    for step, else_s in ((20, 60), (40, 40)):  # features, then scores
        clock.s += else_s
        log.pause()
        clock.s += 10
        log.training(step, [1.0] * 20)
    log.close()
    assert capsys.readouterr().err == ("words: 20 of 100 steps, 2 steps/s, 40 s left, loss 1.000\n"
                                       "words: 40 of 100 steps, 2 steps/s, 30 s left, loss 1.000\n")


def test_a_run_s_speed_leaves_out_time_that_went_into_compiling(clock, capsys, tmp_path):
    parallel._watch_compiling()
    log = journal.Journal(tmp_path, total=100)
    log.phase("words", new=True)

    def compile_for(seconds):
        clock.s += seconds
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", seconds)

    compile_for(60)
    clock.s += 5
    log.training(10, [1.0] * 10)  # too early to tell
    clock.s += 5
    log.training(20, [1.0] * 10)
    with progress.bar("captions of val", 40) as inner:
        compile_for(30)
        clock.s += 10
        inner.update(40)
    log.pause()  # all of it, which compiling is a part of
    clock.s += 10
    log.training(40, [1.0] * 20)
    log.close()
    assert capsys.readouterr().err == ("words: 20 of 100 steps, 2 steps/s, 40 s left, loss 1.000\n"
                                       "captions of val: 40 of 40 photos, 4 photos/s, 0 s left\n"
                                       "words: 40 of 100 steps, 2 steps/s, 30 s left, loss 1.000\n")


def test_a_download_that_goes_on_counts_what_arrives(clock, capsys):
    with progress.bar("train2014.zip", None, "B") as bar:
        bar.n = 10**9
        bar.refresh()
        clock.s += 20
        bar.total = 4 * 10**9
        bar.update(10**8)
        bar.reset()
        clock.s += 20
        bar.update(10**6)
    assert capsys.readouterr().err == ("train2014.zip: 1.10GB of 4.00GB, 5.00MB/s, 10 min left\n"
                                       "train2014.zip: 1.00MB of 4.00GB, 50.0kB/s, 22.2 h left\n")


def test_a_terminal_has_bars_and_other_processes_nothing(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.bar("decoding", 4) as bar:
        assert isinstance(bar, tqdm)
    monkeypatch.undo()
    monkeypatch.setattr(progress, "silent", True)
    with progress.bar("decoding", 4) as bar:
        bar.update(4)
    assert capsys.readouterr().err == ""

"""The speedrun on a Flickr8k of a dozen photos."""

import json

import cv2
import numpy as np
import pytest

from benchmarks import speedrun
from jaxcap.errors import UserError

TINY = ["encoder.name=small_cnn", "encoder.weights=", "decoder.standardize=false", "data.size=32", "data.length_buckets=[]",
        "vocabulary.min_count=1", "batch_size=8", "eval_batch_size=8", "decoder.embedding=16", "decoder.hidden=16",
        "phases.0.epochs=0", "phases.0.steps=3", "log_every=1"]


@pytest.fixture
def source(tmp_path):
    """Flickr8k's layout with eight train and four val photos."""
    folder = tmp_path / "flickr8k"
    (folder / "Flicker8k_Dataset").mkdir(parents=True)
    (folder / "Flickr8k_text").mkdir()
    names = [f"{i}.jpg" for i in range(12)]
    for i, name in enumerate(names):
        cv2.imwrite(str(folder / "Flicker8k_Dataset" / name), np.full((40, 40, 3), 20 * i, np.uint8))
    (folder / "Flickr8k_text" / "Flickr8k.token.txt").write_text("".join(f"{name}#{k}\ta grey wall .\n" for name in names for k in range(5)))
    for split, part in (("train", names[:8]), ("dev", names[8:])):
        (folder / "Flickr8k_text" / f"Flickr_8k.{split}Images.txt").write_text("\n".join(part) + "\n")
    return folder


def test_every_run_is_timed_and_scored_and_the_mean_decides(source, tmp_path, capsys):
    status = speedrun.main([*TINY, "--source", str(source), "--seeds", "3", "4", "--goal", "100", "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert status == 1 and not result["ok"] and "not reached" in capsys.readouterr().out
    for run, seed in zip(result["results"], (3, 4), strict=True):
        assert run["seed"] == seed and run["steps"] == 3 and run["photos_scored"] == 4
        assert run["seconds"] == pytest.approx(run["photos"] + run["training"])
        assert 0 < run["photos"] and 0 < run["compilation"] and 0 < run["training"]
    assert [row[0] for row in result["table"]] == ["run", "seed 3", "seed 4", "mean"]


def test_wrong_settings_are_said_at_once(source):
    with pytest.raises(UserError, match="no config file"):
        speedrun.main(["nowhere.py", "--source", str(source)])
    with pytest.raises(UserError, match="Flicker8k_Dataset"):
        speedrun.main([*TINY, "--source", str(source.parent), "--seeds", "0"])

"""The timing of a trained run's captions: that it writes the same ones from photos and from features. No speed is asserted."""

import json

import pytest

from benchmarks import captions
from jaxcap import features, parallel, progress, runs
from jaxcap.data import records, shapes
from jaxcap.errors import UserError
from test_ensemble import make_run


def test_captions_of_a_split_are_timed_from_photos_or_features(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 16, "val": 12})
    monkeypatch.setattr(progress, "silent", False)
    directory = make_run(tmp_path / "run", 1, steps=(1,))
    arguments = [str(directory), "--beam", "1", "2", "--repeats", "2", "--json", str(tmp_path / "captions.json")]

    def timed():
        assert captions.main(arguments) == 0
        return json.loads((tmp_path / "captions.json").read_text("utf-8"))["results"]

    by_photos = timed()
    assert [(r["source"], r["beam"], r["photos"], len(r["ms"]["repeats"])) for r in by_photos] == [("photos", 1, 12, 2), ("photos", 2, 12, 2)]
    run = runs.load(directory)
    split, devices = records.open_split(run.config.data, "val"), parallel.Parallel("shard_map")
    features.cached(split, run.config, run.captioner, run.params, run.batch_stats, devices, batch_size=8)
    by_features = timed()
    assert {r["source"] for r in by_features} == {"features"}
    assert [r["words"] for r in by_features] == [r["words"] for r in by_photos]  # the same captions
    assert by_features[0]["captions_per_s"] == pytest.approx(12000 / by_features[0]["ms"]["median"])
    assert "greedy" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no split 'tset'"):
        captions.main([*arguments, "--split", "tset"])

"""Batches: every pair once an epoch, shapes that do not vary, a position that can be saved."""

from pathlib import Path

import numpy as np
import pytest

from jaxcap import vocab
from jaxcap.data import pipeline
from jaxcap.data.records import Split
from jaxcap.errors import UserError
from jaxcap.vocab import BOS, EOS, PAD

WORDS = "a b c d e f g h".split()


def split_of(captions):
    return Split(Path("."), "train", [str(i) for i in range(len(captions))], captions, {}, "x")


@pytest.fixture
def examples():
    random = np.random.default_rng(0)
    captions = [[" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(5)] for _ in range(21)]
    split = split_of(captions)
    return pipeline.encode(split, vocab.build((c for cs in captions for c in cs), min_count=1), 8)


def batches(examples, total=100, seed=0, **settings):
    settings = {"batch_size": 8, "kind": "index_B", "fetch": np.asarray, **settings}
    return pipeline.Batches(examples, seed=seed, total=total, **settings)


def rows_of(item):
    index, tokens = item["index_B"].reshape(-1), item["tokens_BT1"].reshape(-1, item["tokens_BT1"].shape[-1])
    return [(int(i), *(int(t) for t in row if t != PAD)) for i, row in zip(index, tokens)]


@pytest.mark.parametrize("buckets", [(), (3, 5, 8)])
def test_an_epoch_shows_every_pair_at_most_once(examples, buckets):
    source = batches(examples, buckets=buckets)
    assert source.per_epoch == 105 // 8
    seen = [row for k in range(source.per_epoch) for row in rows_of(source[k])]
    everything = [(int(p), *(int(t) for t in tokens if t != PAD)) for p, tokens in zip(examples.photo_N, examples.tokens_NCT1[:, 0])]
    assert len(seen) == 104
    for row in set(seen):
        assert seen.count(row) <= everything.count(row)
    second = [row for k in range(source.per_epoch, 2 * source.per_epoch) for row in rows_of(source[k])]
    assert seen != second


def test_buckets_pad_only_to_the_next_length(examples):
    source = batches(examples, buckets=(3, 5, 8))
    lengths = set()
    for k in range(source.per_epoch):
        tokens_BT1 = source[k]["tokens_BT1"]
        tokens_BT1 = tokens_BT1[:, 0]
        lengths.add(tokens_BT1.shape[1])
        assert (tokens_BT1[:, 0] == BOS).all() and ((tokens_BT1 == EOS).sum(axis=1) == 1).all()
    assert lengths == {5, 7, 10}


@pytest.mark.parametrize("buckets", [(), (3, 5, 8)])
def test_batches_that_go_together_are_an_epoch_too(examples, buckets):
    alone, together = batches(examples, buckets=buckets), batches(examples, buckets=buckets, together=3)
    one = [together[k] for k in range(together.items_per_epoch)]
    sizes = [item["tokens_BT1"].shape[1] for item in one]
    assert sum(sizes) == together.per_epoch == alone.per_epoch == 13 and sorted(sizes)[1:] == [3] * 4
    seen = [row for item in one for row in rows_of(item)]
    everything = [(int(p), *(int(t) for t in tokens if t != PAD)) for p, tokens in zip(examples.photo_N, examples.tokens_NCT1[:, 0])]
    assert len(seen) == 104 and all(seen.count(row) <= everything.count(row) for row in set(seen))
    if buckets:  # what goes together is of one length, and some of it is short
        assert {item["tokens_BT1"].shape[2] for item in one} > {10}


def test_the_last_item_ends_with_the_last_batch(examples):
    for total in (1, 12, 13, 14, 31, 39):
        source = batches(examples, total=total, buckets=(3, 5, 8), together=4)
        sizes = [source[k]["tokens_BT1"].shape[1] for k in range(len(source))]
        assert sum(sizes) == total and min(sizes) > 0
        longer = batches(examples, total=1000, buckets=(3, 5, 8), together=4)
        for k in range(len(source)):  # the same but for the end
            assert rows_of({name: array[:, :sizes[k]] for name, array in longer[k].items()}) == rows_of(source[k])


def test_every_view_of_a_photo_is_drawn(examples):
    whole = batches(examples, views=3, numbered=True)[4]
    assert set((whole["index_B"] - 3 * whole["photo_B"]).flat) == {0, 1, 2}
    np.testing.assert_array_equal(whole["photo_B"], batches(examples)[4]["index_B"])
    halves = [batches(examples, views=3, host=h, hosts=2)[4]["index_B"] for h in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), whole["index_B"])


def test_batches_depend_on_seed_and_number_alone(examples):
    np.testing.assert_equal(batches(examples)[30], batches(examples)[30])
    assert rows_of(batches(examples)[3]) != rows_of(batches(examples, seed=1)[3])


def test_hosts_share_a_batch_out(examples):
    whole = rows_of(batches(examples)[5])
    halves = [rows_of(batches(examples, host=h, hosts=2)[5]) for h in (0, 1)]
    assert halves[0] + halves[1] == whole


def test_the_position_of_the_iterator_can_be_saved(examples):
    iterator = pipeline.iterate(batches(examples))
    for _ in range(7):
        next(iterator)
    position = iterator.get_state()
    rest = [next(iterator) for _ in range(5)]
    again = pipeline.iterate(batches(examples))
    again.set_state(position)
    np.testing.assert_equal([next(again) for _ in range(5)], rest)


def test_worker_processes_read_the_same(examples):
    alone, helped = pipeline.iterate(batches(examples, total=6)), pipeline.iterate(batches(examples, total=6), workers=1)
    np.testing.assert_equal(list(alone), list(helped))


def test_fewer_captions_than_a_batch_still_make_one():
    split = split_of([["a b"], ["b a"]])
    few = pipeline.encode(split, vocab.build(["a b"], min_count=1), 4)
    batch = batches(few)[0]
    assert batch["tokens_BT1"].shape == (8, 1, 6) and set(batch["index_B"].flat) == {0, 1}


@pytest.mark.parametrize("hosts", [1, 2])
def test_captions_of_a_photo_go_together(hosts):
    """Three captions, two of them, and one: in threes, the missing ones PAD alone; every caption once an epoch."""
    captions = [["a b c d", "a", "b c"], ["c d e", "e"], ["f"], ["g h", "h", "g", "a b c d e"]] * 3
    split = split_of(captions)
    words = vocab.build((c for cs in captions for c in cs), min_count=1)
    found = pipeline.encode(split, words, 8, captions_per_photo=3)
    assert found.captions == 30 and found.tokens_NCT1.shape == (15, 3, 10)
    assert found.photo_N[:5].tolist() == [0, 1, 2, 3, 3] and found.length_N[:5].tolist() == [4, 3, 1, 2, 5]
    seen = []
    for host in range(hosts):
        source = batches(found, batch_size=4, buckets=(3, 5), together=2, host=host, hosts=hosts)
        for k in range(source.items_per_epoch):
            item = source[k]
            index_BK, tokens_BKT = item["index_B"], item["tokens_BT1"]
            assert tokens_BKT.shape[0] == 3 * index_BK.shape[0] == 3 * 4 // hosts
            for row_KT, photo_K in zip(tokens_BKT, np.repeat(index_BK, 3, axis=0)):
                seen += [(photo, words.decode(row)) for row, photo in zip(row_KT, photo_K) if row[0] == BOS]
    everything = [(photo, text) for photo, texts in enumerate(captions) for text in texts]
    assert len(set(seen)) == len(seen) and set(seen) <= set(everything) and len(seen) >= 30 - 9


def test_captions_that_are_long_empty_or_unknown_are_counted():
    split = split_of([["a b a b a", "", " "], ["zebra yak", "a zebra"]])
    found = pipeline.encode(split, vocab.build(["a b"], min_count=1), 3)
    assert (found.cut, found.empty, found.unknown) == (1, 2, 1)
    assert len(found.photo_N) == 2
    assert found.tokens_NCT1[0, 0].tolist()[-1] == EOS and (found.length_N == [3, 2]).all()
    with pytest.raises(UserError, match="no caption"):
        pipeline.encode(split_of([["", "zebra"]]), vocab.build(["a b"], min_count=1), 3)


def test_photos_are_fetched_by_row(examples):
    source = batches(examples, kind="image_BHWC", fetch=lambda rows: rows[:, None, None, None].astype(np.uint8))
    assert source[2]["image_BHWC"].shape == (8, 1, 1, 1, 1)
    np.testing.assert_array_equal(source[2]["image_BHWC"][:, :, 0, 0, 0], batches(examples)[2]["index_B"])

"""Shards of a file's rows that processes share, and files written at an offset or atomically."""

import json
from itertools import islice

import numpy as np
import pytest

from support import shards
from support.shards import Shards, write_atomically, write_rows, writing_at


def pairs(shards):
    return [(shard.start, shard.stop) for shard in shards]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_the_processes_together_do_every_row_once_in_shards_that_do_not_depend_on_their_number(world, tmp_path):
    notes, expected = tmp_path / "done", [(3, 7), (7, 10), (10, 14), (14, 18), (18, 20)]
    dealt = [pairs(Shards(notes, [3, 10, 20], 4, rank, world)) for rank in range(world)]
    assert sorted(shard for part in dealt for shard in part) == expected
    assert all(dealt) == (world < 6) and max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert not any(Shards(notes, [3, 10, 20], 4, rank, other).left for other in (1, 2, 4) for rank in range(other))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_another_number_of_processes_goes_on_with_what_is_left(before, after, tmp_path):
    done = [shard for rank in range(before) for shard in pairs(islice(Shards(tmp_path / "done", [0, 40], 4, rank, before), 2))]
    noted = [shard for rank in range(before) for shard in json.loads((tmp_path / f"done_{rank}.json").read_text())]
    assert len(done) == 2 * len(noted)  # a shard is noted when the next one is asked for
    left = [shard for rank in range(after) for shard in pairs(Shards(tmp_path / "done", [0, 40], 4, rank, after))]
    assert sorted(left + [tuple(shard) for shard in noted]) == [(i, i + 4) for i in range(0, 40, 4)]


def test_shards_of_another_size_leave_out_only_what_is_wholly_done(tmp_path):
    list(islice(Shards(tmp_path / "done", [0, 40], 6), 4))  # three are noted
    assert pairs(Shards(tmp_path / "done", [0, 40], 5)) == [(15, 20), (20, 25), (25, 30), (30, 35), (35, 40)]


def test_a_shard_during_which_the_run_stopped_is_not_noted(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        for shard in Shards(tmp_path / "done", [0, 12], 4):
            if shard.start == 4:
                raise KeyboardInterrupt
    assert pairs(Shards(tmp_path / "done", [0, 12], 4)) == [(4, 8), (8, 12)]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_rows_written_in_any_order_are_the_file_that_numpy_writes(kind, tmp_path):
    rows = np.arange(60).reshape(20, 3).astype(kind)
    for first in (14, 0, 7):
        write_rows(tmp_path / "rows.npy", rows[first:first + 7], first, 20)
    np.save(tmp_path / "whole.npy", rows)
    assert (tmp_path / "rows.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_writing_at_an_offset_keeps_what_lies_around_it(tmp_path):
    (tmp_path / "file").write_bytes(b"abcdefgh")
    with writing_at(tmp_path / "file", 3) as file:
        file.write(b"XY")
    assert (tmp_path / "file").read_bytes() == b"abcXYfgh"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "done.json"
    write_atomically(path, "old")
    monkeypatch.setattr(shards.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"

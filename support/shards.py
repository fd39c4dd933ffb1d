"""Rows of large files, written in shards that several processes share. A stopped run goes on, also with other processes."""

import json
import os
from contextlib import contextmanager
from itertools import pairwise

import numpy as np


def write_atomically(path, text):
    """Write a small text file. After a kill it is the old one or the new one, never half of one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class Plain:
    """A file with `write` and `flush` only, so that a library cannot write to the disk by itself."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


@contextmanager
def new_file(path):
    """A new file for numpy, torch or faiss to write. An error of the disk is always an OSError that says which.

    When they write by themselves, they report a full disk as an error of another kind, or without its number.
    """
    with open(path, "wb") as file:
        plain = Plain(file)
        try:
            yield plain
        except RuntimeError:  # torch raises its own after the one of the disk
            if plain.error:
                raise plain.error from None
            raise


def noted_in(file):
    """The shards that a process has noted as done: [] if the machine itself stopped before the notes were on the disk."""
    try:
        return json.loads(file.read_text())
    except ValueError:
        return []


class Shards:
    """The shards that this process has left to do, as slices. Each is noted as done when the next one is asked for.

    Shard i belongs to process i % world. Each process notes what it has done in a file of its own. All of these files count,
    so a run may go on with another number of processes.
    """

    def __init__(self, notes, cuts, size, rank=0, world=1):
        """notes: the path of the notes, without number and ending. cuts: a first number, more at which a shard ends, the total."""
        done = np.zeros(cuts[-1], bool)
        for file in notes.parent.glob(f"{notes.name}_*.json"):
            for start, stop in noted_in(file):
                done[start:stop] = True
        self.file = notes.with_name(f"{notes.name}_{rank}.json")
        self.noted = noted_in(self.file) if self.file.exists() else []
        shards = [slice(i, min(i + size, stop)) for start, stop in pairwise(cuts) for i in range(start, stop, size)]
        self.left = [shard for shard in shards[rank::world] if not done[shard].all()]

    def __iter__(self):
        for shard in self.left:
            yield shard
            self.noted.append([shard.start, shard.stop])
            write_atomically(self.file, json.dumps(self.noted))


@contextmanager
def writing_at(path, offset=0):
    """A file to write into from an offset on, in bytes. What was written is on the disk at the end."""
    # Opened for writing only. A machine that also reads a shared file writes whole pages, and others own parts of those.
    number = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(number, "wb") as file:
        file.seek(offset)
        yield file
        file.flush()
        os.fsync(number)


def write_rows(path, rows, first, total):
    """Write the rows (n, K) into a .npy file of shape (total, K), from the row `first` on."""
    header = np.lib.format.header_data_from_array_1_0(rows) | {"shape": (total, *rows.shape[1:])}
    with writing_at(path) as file:
        np.lib.format.write_array_header_1_0(file, header)  # every process writes the same bytes here
        file.seek(first * rows[0].nbytes, os.SEEK_CUR)
        file.write(rows.tobytes())

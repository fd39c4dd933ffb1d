"""The same seed gives the same result, byte by byte: of a training, and of answers. Another seed gives another."""

import shutil
import sys

import pytest
from conftest import ROOT, SMALL, run_script

from chat import EVERY_RULE

sys.path.append(str(ROOT / "benchmarks"))
from faults.repeat import compared, open_chat, record, unequal

QUESTION = "Can my boss refuse to pay me overtime?"


@pytest.fixture(scope="module")
def train(tmp_path_factory, tiny_gemma, rows_file):
    """Runs the training of the fixture `trained` once more, with other arguments behind. Returns the folder."""
    def run(*more):
        folder = tmp_path_factory.mktemp("again") / "trained_models"
        done = run_script("train_memory_decoder.py", "--base_model", tiny_gemma, "--dataset", rows_file, "--output_dir", folder,
                          *SMALL, *more)
        assert done.code == 0, done.err
        return folder
    return run


@pytest.fixture(scope="module")
def again(train):
    return train()


def test_the_same_training_again_leaves_the_same_bytes(trained, again):
    names = {path.name for path in compared(again)}
    assert {"memory_decoder.pt", "faiss_index.bin", "keys.f16", "datastore_values.npy", "neighbours_D.npy", "neighbours_I.npy",
            "datastore_entries.npz", "examples.jsonl", "held_out.jsonl"} <= names
    assert unequal(trained, again) == []


def test_another_seed_of_a_training_leaves_another_memory(trained, train):
    different = unequal(trained, train("--seed", "1"))
    assert {"memory_decoder.pt", "held_out.jsonl", "held_out"} <= set(different)


def test_a_single_changed_byte_is_noticed(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    assert unequal(trained, copy) == []
    keys = next(copy.glob("stages/datastore-*/keys.f16"))
    whole = keys.read_bytes()
    keys.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert unequal(trained, copy) == [str(keys.relative_to(copy))]
    keys.unlink()
    assert unequal(trained, copy) == [str(keys.relative_to(copy))]


@pytest.fixture(scope="module")
def chats(trained, again):
    """A chat with each of the two memories, which are the same."""
    return [open_chat(folder) for folder in (trained, again)]


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_a_question_has_the_same_answer_to_the_last_digit_whatever_was_asked_before(chats, rule):
    first = record(chats[0], QUESTION, rule, 3)
    assert first["tokens"] and all("neighbours" in token for token in first["tokens"])
    record(chats[0], "May I keep a goat?", rule, 3, [(QUESTION, first["answer"])])
    assert record(chats[0], QUESTION, rule, 3) == first == record(chats[1], QUESTION, rule, 3)
    assert record(chats[0], QUESTION, rule, 4)["tokens"] != first["tokens"]


def test_two_processes_give_the_same_text_and_another_seed_another(trained):
    def said(seed):
        done = run_script("app.py", "--model_dir", trained, "--device", "cpu", "--temperature", "2", "--seed", seed,
                          "--ask", QUESTION)
        assert done.code == 0, done.err
        return done.out
    first = said(3)
    assert first.strip() and said(3) == first != said(4)

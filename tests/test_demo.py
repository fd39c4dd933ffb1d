"""The embedded data set, and the script that pretrains the embedded base model."""

import argparse
import json
import lzma
import math
import random
from collections import Counter, defaultdict

import build_base_model
import numpy as np
import pytest
import torch
from build_base_model import Sequences
from conftest import DEMO_ROWS, ROOT, ROWS

import app
import train_memory_decoder
from datastore import Template

TEXTS = ["", " ", "  two  spaces ", "\n\n\ttab\tand\r\nline \n",
         "naïve façade – 東京 Ωμέγα", "😀👩‍👩‍👧 e\u0301", "a\x00b\x7f\u00a0\u200b",
         "Hello , world . Don 't !", "<0x41> <0xE2>", "x=1234567890;",
         "a <unk> b<pad><bos><eos>", "<<eos>> < eos> <eos", "\ud7ff\U0010ffff"]


def test_the_rows_have_the_schema():
    lines = (ROOT / "demo/legal_qa.jsonl").read_bytes().splitlines()
    assert len(lines) >= 400
    for line in lines:
        row = json.loads(line)
        assert list(row) == ["Title", "Question", "Answer"]
        assert all(isinstance(value, str) and value.strip() == value != "" and value.isascii() for value in row.values())


def test_the_areas_are_many_and_of_like_size():
    assert all(": " in row["Title"] for row in DEMO_ROWS)
    areas = Counter(row["Title"].partition(":")[0] for row in DEMO_ROWS)
    assert len(areas) >= 12 and max(areas.values()) <= 2 * min(areas.values())


def test_every_answer_names_its_topic_first():
    for row in DEMO_ROWS:
        assert row["Answer"].startswith(row["Title"] + ". "), row["Answer"]


def test_questions_and_answers_have_the_agreed_lengths():
    for row in DEMO_ROWS:
        assert 5 <= len(row["Question"].split()) <= 100, row["Question"]
        assert 60 <= len(row["Answer"].split()) <= 160, row["Answer"]


def test_the_pages_examples_are_rows_that_the_demo_remembers():
    options = train_memory_decoder.parse_options(["--demo"])
    rows, _ = train_memory_decoder.split_rows(options, Template(options.template))
    assert set(app.QUESTIONS) <= {row["Question"] for row in rows}


def plain(text):
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def test_every_question_stands_once_and_every_answer_under_two_questions():
    assert max(Counter(plain(row["Question"]) for row in DEMO_ROWS).values()) == 1
    titles = defaultdict(list)
    for row in DEMO_ROWS:
        titles[plain(row["Answer"])].append(row["Title"])
    assert {len(of_one) for of_one in titles.values()} == {2} and all(len(set(of_one)) == 1 for of_one in titles.values())


def test_no_two_questions_are_nearly_the_same():
    questions = [row["Question"] for row in DEMO_ROWS]
    assert max(shared_shares(questions).values()) <= 0.5


def word_sequences(text, length=5):
    words = plain(text).split()
    return {tuple(words[i:i + length]) for i in range(len(words) - length + 1)}


def shared_shares(texts):
    """{(i, j): share of common sequences in the smaller set} of all pairs with any, through an inverted index."""
    sets, places = [word_sequences(text) for text in texts], defaultdict(list)
    common = Counter()
    for number, sequences in enumerate(sets):
        for sequence in sequences:
            common.update((other, number) for other in places[sequence])
            places[sequence].append(number)
    return {(i, j): count / min(len(sets[i]), len(sets[j])) for (i, j), count in common.items()}


def test_no_two_answers_are_nearly_the_same():
    answers = [row["Answer"] for row in ROWS]
    assert max(shared_shares(answers).values()) <= 0.5
    half = " ".join(answers[0].split()[:80])
    assert shared_shares([*answers, half])[0, len(answers)] == 1


def test_the_inverted_index_agrees_with_comparing_every_pair():
    answers = [row["Answer"] for row in ROWS[:60]]
    sets, slow = [word_sequences(answer) for answer in answers], {}
    for j in range(len(sets)):
        for i in range(j):
            if sets[i] & sets[j]:
                slow[i, j] = len(sets[i] & sets[j]) / min(len(sets[i]), len(sets[j]))
    assert slow and shared_shares(answers) == slow


@pytest.fixture(scope="module")
def tokenizer():
    return build_base_model.train_tokenizer([" ".join(row.values()) for row in ROWS[:60]], 512)


def random_texts(count=60):
    draw = random.Random(0)
    kinds = ["abc ", " \n\t", "äßλж東😀\u0301", "<>eosbpadunk", "".join(map(chr, range(1, 128)))]
    for _ in range(count):
        yield "".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randrange(80)))


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_gives_back_any_text(tokenizer, text):
    ids = build_base_model.encode(tokenizer, text)
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=True) == text
    assert not set(ids.tolist()) & {0, 1, 2, 3}


def test_the_tokenizer_gives_back_random_text(tokenizer):
    for text in random_texts():
        assert tokenizer.decode(build_base_model.encode(tokenizer, text).tolist(), skip_special_tokens=True) == text


def test_the_tokenizer_puts_bos_in_front(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(name) for name in build_base_model.SPECIAL] == [0, 1, 2, 3]
    for text in ("", "Why?", " two"):
        assert tokenizer(text).input_ids == [2, *build_base_model.encode(tokenizer, text).tolist()]


def test_pretraining_and_the_memory_spell_special_names_alike(base):
    for text in (*TEXTS, *random_texts(20)):
        assert base.encode(text) == [2, *build_base_model.encode(base.tokenizer, text).tolist()]


def make_sequences(weights=(3, 1, 2), seed=0, length=10):
    """Sequences over files whose tokens tell file and place: file f holds 10000 f, 10000 f + 1, ..."""
    sizes = (1000, 500, 400)[:len(weights)]
    return Sequences([10_000 * f + np.arange(size) for f, size in enumerate(sizes)], weights, length, seed)


def test_a_sequence_is_bos_and_one_window_of_one_file():
    sequences = make_sequences()
    for number in range(200):
        sequence = sequences[number]
        assert sequence.dtype == np.int64 and sequence.shape == (11,) and sequence[0] == 2
        assert (np.diff(sequence[1:]) == 1).all()


def test_a_number_gives_the_same_sequence_in_a_new_object_and_any_order():
    sequences = make_sequences()
    for number in reversed(range(0, 900, 7)):
        assert (sequences[number] == make_sequences()[number]).all()
    assert any((sequences[number] != make_sequences(seed=1)[number]).any() for number in range(5))


def test_each_epoch_of_one_file_visits_every_window_once_in_a_new_order():
    sequences, count = make_sequences(weights=(2,)), 98
    epochs = [[sequences[epoch * count + i][1] for i in range(count)] for epoch in range(3)]
    for starts in epochs:
        assert (np.diff(sorted(starts)) == 10).all() and min(starts) < 10
    assert epochs[0] != epochs[1] != epochs[2]


def starts_by_file(sequences, numbers):
    starts = defaultdict(list)
    for number in numbers:
        start = int(sequences[number][1])
        starts[start // 10_000].append(start)
    return starts


def test_each_file_keeps_its_share_at_any_time():
    sequences = make_sequences(weights=(3, 1, 2))
    for first in (0, 500, 1111):
        counts = {file: len(starts) for file, starts in starts_by_file(sequences, range(first, first + 600)).items()}
        assert counts == pytest.approx({0: 300, 1: 100, 2: 200}, abs=4)


def test_each_epoch_of_several_files_visits_every_window_once():
    starts = starts_by_file(make_sequences(), range(1000))
    for file, count in ((0, 98), (1, 48), (2, 38)):
        visited = len(set(starts[file][:count]))
        assert visited == count, f"file {file}: the first {count} draws visit {visited} of {count} windows"


def test_halves_have_bos_in_front_and_lose_no_token():
    batch = np.concatenate([np.full((3, 1), 2), np.arange(100, 136).reshape(3, 12)], axis=1)
    halves = build_base_model.halve(batch)
    expected = [[2, *row[1:7]] for row in batch.tolist()] + [[2, *row[7:]] for row in batch.tolist()]
    assert halves.tolist() == expected


def test_a_small_share_of_tokens_behind_bos_becomes_unknown():
    batch = np.concatenate([np.full((50, 1), 2), np.arange(100, 50_100).reshape(50, 1000)], axis=1)
    marked = build_base_model.mark_unknown(batch, [0, 7])
    assert (marked == build_base_model.mark_unknown(batch, [0, 7])).all()
    assert (marked[marked != batch] == 3).all() and (marked[:, 0] == 2).all()
    assert 0.003 < (marked == 3).mean() < 0.008
    assert (marked != build_base_model.mark_unknown(batch, [0, 8])).any()


def test_the_rate_warms_up_stays_and_falls_to_nearly_nothing():
    steps, decay = 1000, 0.4
    rates = [build_base_model.rate_factor(step, steps, decay) for step in range(steps)]
    assert rates[0] == pytest.approx(1 / 50) and (np.diff(rates[:50]) > 0).all()
    assert set(rates[49:601]) == {1.0}
    assert np.diff(rates[600:]) == pytest.approx(-1 / 400) and rates[-1] == pytest.approx(1 / 400)


@pytest.mark.parametrize("length", [32, 6])  # one batch of windows, and several
def test_bits_per_byte_equals_scoring_token_by_token(length, base):
    text, half = "Ünder the <unk> lease, no. 12 " + ROWS[0]["Answer"][:147], length // 2
    ids = base.tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(base.tokenizer.unk_token_id) == 1
    assert len(ids) > 2 * length and len(ids) % half
    nats = 0.0
    for i, token in enumerate(ids):
        context = [2, *ids[max(0, i // half * half - half):i]]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = base.model(torch.tensor([context]), use_cache=False).logits[0, -1].float()
        nats -= torch.log_softmax(logits, -1)[token].item()
    fast = build_base_model.bits_per_byte(base.model, base.tokenizer, text, length, "cpu")
    assert fast == pytest.approx(nats / math.log(2) / len(text.encode("utf-8")), rel=5e-3)


def settings(folder, stop=math.inf):
    return argparse.Namespace(
        work_dir=folder, vocab_size=512, hidden_size=128, num_layers=1, intermediate_size=32, tokens=2 * 16 * 10, batch_size=2,
        max_length=16, lr=0.02, embedding_lr=4e-3, weight_decay=0.01, decay=0.5, checkpoint_minutes=5, stop_after_minutes=stop,
        compile=False, seed=0, device="cpu")


def train(folder, stop=math.inf):
    """(done, weights) after training from a new model on, as a new run of the script would."""
    args = settings(folder, stop)
    model = build_base_model.make_model(args)
    tokens = [np.random.default_rng(f).integers(4, 512, 400).astype(np.uint16) for f in range(2)]
    done = build_base_model.train(args, model, None, tokens, [2.0, 1.0], "")
    return done, {name: weight.clone() for name, weight in model.state_dict().items()}


def test_a_run_stopped_again_and_again_equals_an_uninterrupted_one(tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "stopped").mkdir()
    done, whole = train(tmp_path / "whole")
    assert done
    # Eight of ten steps, one a run: past the point from which sequences have their full length.
    runs = [train(tmp_path / "stopped", stop=0) for _ in range(8)]
    assert not any(done for done, _ in runs)
    assert any((runs[0][1][name] != whole[name]).any() for name in whole)
    done, resumed = train(tmp_path / "stopped")
    assert done and all(torch.equal(resumed[name], whole[name]) for name in whole)


def write_documents(path, rows):
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.jsonl.xz"])
def test_documents_leave_out_some_sources_and_hold_out_their_ends(tmp_path, name):
    texts = [(row["Answer"] + " ") * 3 for row in ROWS[:5]] + ["short", ""]
    rows = [{"source": f"book-{i}", "text": text} for i, text in enumerate(texts)]
    left_out = [{"source": source, "text": "secret " * 100} for source in build_base_model.LEFT_OUT]
    assert left_out
    documents = list(build_base_model.read_documents(write_documents(tmp_path / name, [*left_out, *rows, *left_out])))
    assert [train + held for train, held in documents] == texts
    for (_, held), text in zip(documents, texts, strict=True):
        assert len(held) == math.ceil(round(0.02 * len(text), 6))


def test_documents_are_read_in_plain_marks(tmp_path):
    path = write_documents(tmp_path / "a.jsonl", [{"source": "x", "text": "‘a’ “b” – c — d…\u00a0e\n\n\n\n\nf\n\ng"}])
    ((train, held),) = build_base_model.read_documents(path)
    assert train + held == "'a' \"b\" - c - d... e\n\nf\n\ng"


def test_prepared_tokens_are_the_training_parts_and_are_made_once(tmp_path):
    rows = [{"source": "x", "text": row["Answer"]} for row in ROWS[:30]]
    paths = [write_documents(tmp_path / f"{i}.jsonl", rows[10 * i:]) for i in range(2)]
    args = argparse.Namespace(work_dir=tmp_path / "work", vocab_size=420, text=[f"{paths[0]}:2.5", paths[1]])
    tokenizer, tokens, weights, held_out = build_base_model.prepare(args)
    assert weights == [2.5, 1.0]
    for path, ids, held in zip(paths, tokens, held_out, strict=True):
        parts = list(build_base_model.read_documents(path))
        assert tokenizer.decode(ids.tolist()) == "".join(train for train, _ in parts)
        assert held.read_text() == "\n\n".join(end for _, end in parts)
    stamps = [path.stat().st_mtime_ns for path in sorted(next(args.work_dir.glob("tokens_420_*")).iterdir())]
    build_base_model.prepare(args)
    assert stamps == [path.stat().st_mtime_ns for path in sorted(next(args.work_dir.glob("tokens_420_*")).iterdir())]

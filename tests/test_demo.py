"""The embedded data set."""

import json
from collections import Counter, defaultdict

from conftest import DEMO_ROWS, ROOT, ROWS

import train_memory_decoder
from corpus import Corpus
from web import page


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
    questions = [example.row["Question"] for example in Corpus.read(options).examples]
    examples = page.example_questions(questions)
    assert len(set(examples)) == 4 and set(examples) <= set(questions)


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

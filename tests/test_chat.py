"""A memory of chats: `--template chat` from the command to the page's answer."""

import html

import pytest
import torch
from conftest import ROWS, SMALL, run_script
from gradio_client import Client
from runs import entry_places, running_app, stored_rows
from test_app import GOOD, PASSAGE, QUESTION, answers, said

import app
from base_model import Literal
from memory_decoder import read_manifest
from texts import encode_row

HISTORY = [("May I go?", "You may."), ("And my dog?", "Dogs may go too, if they are on a lead.")]


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tiny_gemma, rows_file):
    """A folder that a training on chats has filled."""
    folder = tmp_path_factory.mktemp("chats") / "out"
    done = run_script("train_memory_decoder.py", "--base_model", tiny_gemma, "--dataset", rows_file, "--output_dir", folder, *SMALL,
                      "--template", "chat")
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def chat(chats):
    return app.Chat.open(app.Options(model_dir=str(chats), device="cpu"), read_manifest(chats))


def messages(turns, question=None):
    pairs = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    return [*pairs, {"role": "user", "content": question}] if question else pairs


def templated(base, turns, question=None):
    """Token ids of a conversation as transformers writes it; with a question, up to where the answer begins."""
    text = base.tokenizer.apply_chat_template(messages(turns, question), tokenize=False, add_generation_prompt=bool(question))
    return base.tokenizer(text, add_special_tokens=False).input_ids


def test_rows_are_stored_as_questions_and_answers_that_the_manifest_names(chats):
    assert read_manifest(chats)["template"] == "chat {Question} {Answer}"
    stored = stored_rows(chats)
    assert len(stored) == 22 and all(row in [{n: r[n] for n in ("Question", "Answer")} for r in ROWS] for row in stored)


def test_every_entry_remembers_the_next_token_of_the_models_own_conversation(chats, chat):
    base, end = chat.model.base, chat.model.base.tokenizer.convert_tokens_to_ids("<end>")
    conversations = [templated(base, [(row["Question"], row["Answer"])]) for row in chat.store.rows]
    values, places = chat.store.values.tolist(), entry_places(chats)
    assert values == [conversations[row][position + 1] for row, position in places]
    # The header "<bos><turn>user\n" makes no entry. The last value of each row is the mark that ends its answer.
    header = len(base.encode([Literal("<turn>user\n")]))
    lengths = [len(ids) - ids[::-1].index(end) for ids in conversations]
    assert sorted(places) == [(row, p) for row, length in enumerate(lengths) for p in range(header, length - 1)]


def test_the_pages_prompt_is_the_models_chat_template_with_two_earlier_turns(chat):
    base = chat.model.base
    for turns in ([], HISTORY[:1], HISTORY):
        assert base.encode(chat.prompt(QUESTION, turns, 10)) == templated(base, turns, QUESTION)
    text = base.tokenizer.apply_chat_template(messages(HISTORY, QUESTION), tokenize=False, add_generation_prompt=True)
    assert "".join(chat.prompt(QUESTION, HISTORY, 10)) == text.removeprefix("<bos>")


def test_the_prompt_begins_as_the_stored_conversations_do(chat):
    base = chat.model.base
    for row in chat.store.rows[:5]:
        ids = base.encode(chat.prompt(row["Question"], [], 10))
        assert encode_row(base, chat.template, row)[:len(ids)] == ids


def test_marks_that_a_user_types_are_letters_to_the_model(chat):
    base = chat.model.base
    plain, typed = (base.encode(chat.prompt(text, [], 10)) for text in ("Why?", "Why?<end>\n<turn>assistant\nSo<eos><bos>"))
    for mark in ("<turn>", "<end>", "<eos>", "<bos>"):
        token = base.tokenizer.convert_tokens_to_ids(mark)
        assert plain.count(token) == typed.count(token)


def test_the_answer_reads_the_earlier_turns(chat):
    history = [said(message["role"], message["content"]) for message in messages(HISTORY)]
    prompt = chat.prompt(QUESTION, HISTORY, 12)
    expected = "".join(step.text for step in chat.model.stream(prompt, 0.5, 0, 50, 12))
    assert answers(chat, history=history)[-1][0] == expected
    assert answers(chat)[-1][0] != expected


def test_an_answer_ends_at_the_mark_that_ends_a_turn(chat, monkeypatch):
    base, end = chat.model.base, chat.model.base.tokenizer.convert_tokens_to_ids("<end>")
    tokens = [*base.tokenizer(" It may.", add_special_tokens=False).input_ids, end, 300]
    drawn = iter(tokens)
    monkeypatch.setattr("generation.sample", lambda *_: next(drawn))
    steps = list(chat.model.stream(chat.prompt(QUESTION, [], 12), max_new_tokens=12))
    assert [step.token for step in steps] == tokens[:-1]
    assert "".join(step.text for step in steps) == "It may."


def test_a_passage_marks_the_right_next_token(chat):
    base = chat.model.base
    for entry in range(0, len(chat.store), 29):
        ((before, token, after, title, _),) = PASSAGE.findall(chat.passage(0.25, entry))
        row, position = chat.store.rows[chat.store.example[entry]], int(chat.store.position[entry])
        ids = templated(base, [(row["Question"], row["Answer"])])
        remembered = base.tokenizer.decode([ids[position + 1]], skip_special_tokens=True)
        assert html.unescape(token) == (remembered or "(end)")
        assert html.unescape(title) == row["Question"][:120]
        text = f"user\n{row['Question']}\nassistant\n{row['Answer']}"  # the marks themselves are not shown
        assert html.unescape(before + token.replace("(end)", "") + after) in text


def test_a_question_that_was_stored_leads_to_its_own_passage(chat):
    row = min(chat.store.rows, key=lambda row: len(row["Question"]))
    ids = chat.model.base.encode(chat.prompt(row["Question"], [], 10))
    assert len(ids) < 96  # in the first of its windows
    hidden = chat.model.base.hidden(torch.tensor([ids]))[0, -1:]
    ((*_, title, distance),) = PASSAGE.findall(chat.passages(hidden.float(), 1))
    assert html.unescape(title) == row["Question"][:120] and float(distance) < 0.1


def test_the_page_answers_from_a_memory_of_chats(chats, chat, tmp_path):
    with running_app(chats, tmp_path / "log.txt") as address:
        client = Client(address, verbose=False, analytics_enabled=False)
        text, tokens, _, passages = client.predict(message=QUESTION, **GOOD, api_name="/chat")
        client.close()
    assert text and "".join(token for token, _ in tokens) == text == answers(chat)[-1][0]
    titles = {html.unescape(title) for *_, title, _ in PASSAGE.findall(passages)}
    assert titles and titles <= {row["Question"][:120] for row in stored_rows(chats)}

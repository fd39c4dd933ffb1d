"""A memory of chats: `--template chat` from the command to the page's answer."""

import pytest
from conftest import ROWS, rows_of
from gradio_client import Client
from runs import command_line, entry_places, stored_rows
from test_chat import GOOD, QUESTION

import app
import train_memory_decoder
from base_model import Literal
from chat import Chat
from generation import Settings
from memory_decoder import read_manifest
from web import page

HISTORY = [("May I go?", "You may."), ("And my dog?", "Dogs may go too, if they are on a lead.")]


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tiny_gemma, rows_file):
    """A folder that a training on chats has filled."""
    folder = tmp_path_factory.mktemp("chats") / "out"
    train_memory_decoder.run(train_memory_decoder.parse_options(
        command_line(tiny_gemma, rows_file, folder, "--template", "chat")))
    return folder


@pytest.fixture(scope="module")
def chat(chats):
    return Chat.open(app.Options(model_dir=str(chats), device="cpu"), read_manifest(chats))


def written(chat, turns=()):
    *_, answer = chat.write(chat.begin(QUESTION, turns, **GOOD))
    return answer


def ids_of(answer):
    return [token["id"] for token in answer.tokens]


def messages(turns, question=None):
    pairs = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    return [*pairs, {"role": "user", "content": question}] if question else pairs


def templated(base, turns, question=None):
    """Token ids of a conversation as transformers writes it. After a question, up to where the answer begins."""
    text = base.tokenizer.apply_chat_template(messages(turns, question), tokenize=False, add_generation_prompt=bool(question))
    return base.tokenizer(text, add_special_tokens=False).input_ids


def test_rows_are_stored_as_questions_and_answers_that_the_manifest_names(chats):
    assert read_manifest(chats)["sources"] == [{"name": "rows.jsonl", "template": "chat {Question} {Answer}"}]
    stored = stored_rows(chats)
    assert len(stored) == 22 and all(row in [{n: r[n] for n in ("Question", "Answer")} for r in ROWS] for row in stored)


def test_every_entry_remembers_the_next_token_of_the_models_own_conversation(chats, chat):
    base, end = chat.model.base, chat.model.base.tokenizer.convert_tokens_to_ids("<end>")
    conversations = [templated(base, [(row["Question"], row["Answer"])]) for row in rows_of(chat.store)]
    values, places = chat.store.values.tolist(), entry_places(chats)
    assert values == [conversations[row][position + 1] for row, position in places]
    # The header "<bos><turn>user\n" makes no entry. The last value of each row is the mark that ends its answer.
    header = len(base.encode([Literal("<turn>user\n")]))
    lengths = [len(ids) - ids[::-1].index(end) for ids in conversations]
    assert sorted(places) == [(row, p) for row, length in enumerate(lengths) for p in range(header, length - 1)]


def test_the_answer_reads_the_earlier_turns(chat):
    prompt = chat.prompt(QUESTION, HISTORY, 12)
    assert chat.model.base.encode(prompt) == templated(chat.model.base, HISTORY, QUESTION)
    expected = [step.token for step in chat.model.stream(prompt, Settings(alpha=0.5, temperature=2, top_k=200), 12, seed=3)]
    assert ids_of(written(chat, HISTORY)) == expected != ids_of(written(chat))


def test_a_passage_marks_the_right_next_token(chat):
    base = chat.model.base
    for entry in range(0, len(chat.store), 29):
        found = chat.passage(entry)
        row, position = rows_of(chat.store)[chat.store.example[entry]], int(chat.store.position[entry])
        ids = templated(base, [(row["Question"], row["Answer"])])
        remembered = base.tokenizer.decode([ids[position + 1]], skip_special_tokens=True)
        assert found["token"] == (remembered or "(end)") and found["title"] == row["Question"]
        text = f"user\n{row['Question']}\nassistant\n{row['Answer']}"  # the marks themselves are not shown
        assert found["before"].removeprefix("… ") + remembered + found["after"] in text


def test_a_question_that_was_stored_leads_to_its_own_passage(chat):
    row = min(rows_of(chat.store), key=lambda row: len(row["Question"]))
    assert len(chat.model.base.encode(chat.prompt(row["Question"], [], 10))) < 96  # in the first of its windows
    answer = next(chat.write(chat.begin(row["Question"], k=1)))
    ((distance, entry),) = chat.trace(answer).tokens[0]["neighbours"]
    assert chat.passage(entry)["title"] == row["Question"] and distance < 0.1


def test_the_page_answers_from_a_memory_of_chats(chats, chat):
    blocks = page.Page(chat, app.Options()).build()
    try:
        _, address, _ = page.launch(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        client = Client(address, verbose=False, analytics_enabled=False)
        settings = {name: value for name, value in GOOD.items() if name != "k"}
        text, logprobs = client.predict(message=QUESTION, **settings, api_name="/chat")
        passages = client.predict(message=QUESTION, tokens=[logprobs["content"][0]["id"]], api_name="/passages")
        client.close()
    finally:
        blocks.close()
    assert text == written(chat).text == "".join(entry["token"] for entry in logprobs["content"])
    assert len(passages) == 8 and {p["title"] for p in passages} <= {row["Question"] for row in stored_rows(chats)}

"""A page whose memory was trained again loads the new one when a visitor asks for it."""

import shutil

import gradio as gr
import pytest
from conftest import served
from gradio_client import Client

from app import Options
from base_model import file_checksum
from chat import Chat
from memory_decoder import MemoryDecoder, read_manifest
from support.sealed import sealed
from web import page

QUESTION = "Can my boss refuse to pay me overtime?"


def answer(address):
    """The memory's own answer."""
    return Client(address, verbose=False).predict(QUESTION, 1.0, 0.0, 50, 12, "logits", api_name="/chat")[0]


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "memory", ignore=shutil.ignore_patterns("stages"))


def train_again(folder):
    """Put another memory into a folder, which prefers other tokens."""
    manifest, decoder = read_manifest(folder), MemoryDecoder.load(folder / "memory_decoder.pt")
    decoder.output_projection.bias.data.neg_()
    decoder.output_projection.weight.data.neg_()
    decoder.save(folder / "memory_decoder.pt")
    manifest["files"]["memory_decoder.pt"] = file_checksum(folder / "memory_decoder.pt")
    (folder / "config.json").write_text(sealed(manifest))


def test_a_click_loads_the_memory_that_was_trained_again(browser, folder, tmp_path):
    with served(folder, tmp_path / "log.txt") as address:
        before = answer(address)
        train_again(folder)
        assert answer(address) == before
        visitor = browser.new_page()
        visitor.set_default_timeout(60_000)
        visitor.goto(address)
        visitor.locator("#news button").click()
        visitor.locator("#news button").wait_for(state="detached")
        visitor.wait_for_selector("#question textarea")
        assert visitor.url == address
        visitor.close()
        after = answer(address)
    fresh = Chat.open(Options(model_dir=str(folder), device="cpu"), read_manifest(folder))
    expected = fresh.begin(QUESTION, rule="logits", alpha=1.0, temperature=0.0, max_new_tokens=12)
    list(fresh.write(expected))
    assert after == expected.text != before


def open_page(folder, monkeypatch):
    options = Options(model_dir=str(folder), device="cpu")
    opened = page.Page(Chat.open(options, read_manifest(folder)), options)
    opened.blocks, closed = gr.Blocks(), []
    monkeypatch.setattr(opened.blocks, "close", lambda: closed.append(True))
    return opened, closed


def test_the_base_model_is_loaded_once_and_the_old_page_is_closed(folder, monkeypatch):
    opened, closed = open_page(folder, monkeypatch)
    train_again(folder)
    opened.load_again()
    newer = opened.followed_by()
    assert closed == [True] and newer.model.base is opened.chat.model.base and newer.manifest == read_manifest(folder)


def test_a_page_whose_memory_is_still_the_same_stays(folder, monkeypatch):
    opened, closed = open_page(folder, monkeypatch)
    opened.load_again()
    assert opened.followed_by() is None and closed == []


def test_a_page_whose_new_memory_is_damaged_stays_and_says_why(folder, monkeypatch):
    opened, closed = open_page(folder, monkeypatch)
    train_again(folder)
    (folder / "examples.jsonl").write_bytes(b"")
    with pytest.raises(gr.Error, match=r"examples\.jsonl is damaged"):
        opened.load_again()
    assert opened.followed_by() is None and closed == []

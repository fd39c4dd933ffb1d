"""What the page shows of an answer, as HTML."""

import html
import re

import pytest

from chat import END, Answer
from generation import Settings
from web import panels

ODD = "<b>&amp; \"x\" ${1+1} {{y}}"


def candidate(number, text, base, memory, blended):
    return {"id": number, "text": text, "base": base, "memory": memory, "blended": blended}


def token(number=1, text=" a", base=0.2, memory=0.6, blended=0.4, cut=0.0, end=False, more=()):
    return {"id": number, "text": text, "end": end, "base": base, "memory": memory, "blended": blended, "alpha": 0.5, "cut": cut,
            "candidates": sorted([candidate(number, text or END, base, memory, blended), *more], key=lambda c: -c["blended"])}


def answer(*tokens, kept=0, **settings):
    return Answer("Why?", [], Settings(**settings), 10, 7, 8, kept, list(tokens), seconds=2.0)


def spans(text):
    return re.findall(r'<span class="(token[^"]*)" style="([^"]*)"[^>]*>(.*?)</span>', text, re.DOTALL)


@pytest.mark.parametrize("text", [ODD, "</span><script>", "a\nb", "$x$ **y**"])
def test_every_text_is_escaped(text):
    chosen = token(text=text, more=[candidate(2, text, 0.1, 0.1, 0.1)])
    passage = {"title": text, "before": text, "token": text, "after": text, "distance": 1.0, "weight": 1.0}
    for shown in (panels.tokens(answer(chosen)), panels.candidates(answer(chosen), 0), panels.passages([passage], text),
                  panels.voices([answer(chosen)] * 3)):
        assert html.escape(text.replace("\n", "⏎")) in shown.replace("\n", "⏎")
        assert text not in shown or html.escape(text) == text


def test_the_tokens_texts_together_are_the_answer():
    shown = spans(panels.tokens(answer(token(text="A "), token(text=""), token(text="b.\n"), token(text="", end=True))))
    assert "".join(text for _, _, text in shown) == "A b.\n"
    assert "silent" in shown[1][0].split() and "end" in shown[-1][0].split()


@pytest.mark.parametrize(("base", "blended", "word", "strength"), [
    (0.1, 0.1, "more", 0), (0.01, 0.99, "more", 0.92), (0.5, 0.05, "less", 0.46), (1e-9, 1, "more", 1), (1, 0, "less", 1)])
def test_the_effect_is_the_log_ratio_of_blend_and_base(base, blended, word, strength):
    ((words, style, _),) = spans(panels.tokens(answer(token(base=base, blended=blended))))
    assert word in words.split() and f"--effect:{strength:.2f};" in style


def test_the_surprise_is_the_blends_and_alpha_is_the_tokens():
    ((_, style, _),) = spans(panels.tokens(answer(token(blended=0.5))))
    assert style.endswith("--alpha:0.50;--surprise:0.14")


def test_kept_and_open_tokens_are_marked():
    shown = spans(panels.tokens(answer(*[token()] * 3, kept=2), opened=1))
    assert [("kept" in words.split(), "open" in words.split()) for words, *_ in shown] == [(1, 0), (1, 1), (0, 0)]


def test_an_answer_without_words_says_so():
    assert panels.NO_ANSWER in panels.tokens(answer(token(text="", end=True)))
    assert panels.NO_ANSWER not in panels.tokens(answer(token()))


def rows(shown):
    return re.findall(r'<tr class="([^"]*)"><td><button[^>]*data-token="(\d+)"[^>]*>(.*?)</button>', shown)


def test_the_candidates_are_the_ten_best_of_any_and_the_chosen_one_the_blends_best_first():
    others = [candidate(n, f"w{n}", *chances) for n, chances in enumerate(
        [(0.3, 0, 0.1), (0, 0.3, 0.2), *[(0.01 * n, 0, 0.001 * n) for n in range(1, 12)]], start=2)]
    shown = rows(panels.candidates(answer(token(blended=1e-4, base=1e-4, memory=1e-4, more=others)), 0))
    assert len(shown) == 10 and [int(i) for _, i, _ in shown[:2]] == [3, 2] and shown[-1][:2] == ("chosen", "1")
    # w4 and w5, the least probable, are left out.
    assert {int(i) for _, i, _ in shown} == {1, 2, 3, *range(8, 15)}


def test_the_cut_of_top_k_is_marked_once_in_front_of_the_first_that_it_leaves_out():
    others = [candidate(n, f"w{n}", 0.1, 0.1, 0.3 - 0.05 * n) for n in range(2, 6)]
    shown = rows(panels.candidates(answer(token(cut=0.17, more=others)), 0))
    assert [words.split() for words, *_ in shown] == [["chosen"], [], ["out", "cut"], ["out"], ["out"]]
    assert "cut off by top-k" in panels.candidates(answer(token(cut=0.17, more=others)), 0)
    assert "cut off by top-k" not in panels.candidates(answer(token(cut=0.0, more=others)), 0)


def test_the_columns_add_up_with_all_others():
    others = [candidate(2, "b", 0.5, 0.1, 0.3)]
    cells = re.findall(r"<td[^>]*>(?:<span[^>]*></span>)?([\d.]+)%", panels.candidates(answer(token(more=others)), 0))
    numbers = [float(cell) for cell in cells]
    assert [sum(numbers[i::3]) for i in range(3)] == pytest.approx([100] * 3, abs=0.2)


def test_candidates_that_were_not_kept_are_spoken_of():
    thin = {k: v for k, v in token().items() if k != "candidates"}
    assert "not kept" in panels.candidates(answer(thin), 0) and "<table" not in panels.candidates(answer(thin), 0)


def test_spaces_and_line_ends_of_a_token_can_be_seen():
    assert [panels.visible(text) for text in (" a b ", "\n", "  ", "a")] == ["␣a b␣", "⏎", "␣␣", "a"]


def test_the_facts_name_count_speed_share_rule_and_seed():
    changed = token(more=[candidate(2, "b", 0.5, 0.1, 0.3)])  # the base would have said b
    line = panels.facts(answer(changed, token(), changed, rule="auto", kept=1))
    assert "2 tokens, 1.0 a second" in line and "50% of them" in line and "alpha chosen at each token" in line and "seed 7" in line
    assert "stopped after" not in line and "stopped after 2" in panels.facts(answer(token(), changed, changed, kept=1), True)
    assert "alpha 0.3" in panels.facts(answer(token(), alpha=0.3))
    assert "5 neighbours" in panels.facts(answer(token(), rule="kNN-LM", knn_k=5))


def test_no_passage_makes_no_panel():
    assert panels.passages([], "Nothing") == ""

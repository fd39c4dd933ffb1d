"""The rivals in benchmarks/ on a tiny model: each fast way against a slow twin, and the table that they fill."""

import importlib.util
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, make_decoder

import answers
import compare
import evaluation
import neighbours
import plots
import retrieval
import rivals
import rules
import tuned
from datastore import Datastore
from index import build_index
from texts import Template, encode_row, entries_of, windows_of

# Its name is that of a module of the project too.
spec = importlib.util.spec_from_file_location("stages_bench", ROOT / "benchmarks/stages.py")
stages_bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stages_bench)

TEMPLATE = Template.parse("{Title}\nAnswer: {Answer}")


@pytest.fixture(scope="module")
def ids(base):
    """Token ids of stored rows, and of others in part the same."""
    stored, others = ([encode_row(base, TEMPLATE, row)[:80] for row in rows] for rows in (ROWS[:12], ROWS[2:40:6]))
    return stored, others


@pytest.fixture(scope="module")
def windows(base):
    return windows_of(base, ROWS[3:6], TEMPLATE, 64)


def test_the_n_gram_predicts_as_a_search_of_all_rows_for_the_longest_known_context_does(ids):
    stored, others = ids
    ngram, told = retrieval.NGram(stored), 0
    for row in others:
        for i, (chance, sparse) in enumerate(ngram.predict(row)):
            for length in range(min(i + 1, retrieval.LONGEST), -1, -1):
                context = row[i + 1 - length:i + 1]
                counts = Counter(s[j + length] for s in stored for j in range(len(s) - length) if s[j:j + length] == context)
                if counts:
                    break
            assert chance == pytest.approx(counts[row[i + 1]] / counts.total()) and sparse == (len(counts) == 1)
            told += length > 3
    assert told > 20  # long contexts did occur


def test_a_row_in_the_prompt_keeps_the_entries_and_is_the_one_with_the_windows_words(base, ids, windows):
    finder = retrieval.InPrompt(base, [encode_row(base, TEMPLATE, row) for row in ROWS[:12]], 40)
    longer = finder.windows(windows)
    for name in ("values", "example", "position"):
        assert np.array_equal(getattr(entries_of(longer), name), getattr(entries_of(windows), name))
    first = next(w for w in windows if w.example == 0 and w.position < 20)
    query = base.tokenizer.decode(first.ids, skip_special_tokens=True)
    assert finder.rows[finder.nearest(query)] == encode_row(base, TEMPLATE, ROWS[3])
    assert all(long.ids[-len(w.ids):] == w.ids and base.encode("\n")[1:] == long.ids[-len(w.ids) - 1:-len(w.ids)]
               for long, w in zip(longer, windows, strict=True))
    scores = rules.base_scores(base, longer, 2)
    for window, start in zip(longer, entries_of(longer).offsets, strict=False):
        z = torch.log_softmax(base.logits(base.hidden(torch.tensor([window.ids])))[0, window.skip], -1)
        assert scores[start] == pytest.approx(float(z[window.ids[window.skip + 1]]), abs=1e-4)


def test_the_correction_is_the_base_times_what_training_changed(base, windows):
    decoder, fresh = make_decoder(seed=1), make_decoder(seed=2)
    table, values = rules.correction_table(base, decoder, fresh, windows, 2), entries_of(windows).values
    hidden = base.hidden(torch.tensor([windows[0].ids]))[:, windows[0].skip:-1]
    z = base.logits(hidden)[0]
    new, old = (d.log_probabilities(d.features(hidden.float())[0], z) for d in (decoder, fresh))
    for column, weight in enumerate(rules.WEIGHTS.tolist()):
        expected = torch.log_softmax(torch.log_softmax(z, -1) + weight * (new - old), -1)
        assert table[:len(z), column] == pytest.approx(expected[range(len(z)), values[:len(z)]].detach().numpy(), abs=1e-3)


def test_the_router_learns_where_the_memory_is_right():
    draw = np.random.default_rng(0)
    side = draw.integers(0, 2, 3000)
    states = torch.from_numpy(np.where(side, 1.0, -1.0)[:, None] + 0.1 * draw.normal(size=(3000, 4))).float()
    scores = {"base": np.where(side, -4.0, -0.5), "memory": np.where(side, -0.5, -4.0), "opinions": draw.normal(size=(3000, 5))}
    part = rules.router_part(states, scores, np.zeros((3000, 3)))
    router = rules.fit_router(part, np.repeat(np.arange(30), 100), part, 0.1)
    assert router.mixed(part).mean() > -0.6 > evaluation.mix_probabilities(scores["base"], scores["memory"]).mean(0).max()


def test_knn_takes_the_best_of_all_settings_on_the_positions_given():
    base, table = np.log([0.5, 0.1, 0.1]), np.log([[0.1, 0.6], [0.2, 0.5], [0.1, 0.4]])
    assert retrieval.best_knn(base, table)[0] == 1
    assert retrieval.best_share(base, table[:, 0]) < retrieval.best_share(base, table[:, 1])


def test_an_answer_knows_a_word_in_its_first_sixty_and_keeps_its_facts():
    row = {"Accepted": ["Paris"]}
    assert answers.knows("It is paris.", row) and not answers.knows("Parish", row)
    assert not answers.knows("so " * 60 + "Paris", row)
    told = answers.facts("Ask the Department of Labor within 30 days, or pay $1,500. Then wait")
    assert told == {"Department", "Labor", "30", "$1,500"}


def test_the_table_has_a_line_for_each_rival_with_the_range_of_several_seeds():
    row = {"nats": [[46.0, 20]] * 4, "perplexity": 10.0, "bits_a_byte": 1.0, "elsewhere": 20.0, "seconds": 5, "bytes": 2e6,
           "note": "alpha 0.5"}
    auto = {"nats": [[40.0, 20]] * 4, "note": "", "bytes": 1e6}
    results = [{"memory": {"base": row, "automatic alpha": row | auto | {"perplexity": share * 10}},
                "pace": {"automatic alpha": {"milliseconds_a_token": 7.0, "prompt_milliseconds": 90.0}}} for share in (0.8, 0.9)]
    *_, base, ours = compare.table(results).split("\n")
    first, second = "1.350 (1.350 to 1.350)", "1.000 (1.000 to 1.000)"  # exp((46 - 40) / 20)
    assert base == f"| base | 10.00 | 1.000 | 1.000 to 1.000 | {first} | 1.000 | 1.000 | 5 | 2.0 |  |  | alpha 0.5 |"
    assert ours == f"| automatic alpha | 8.50 | 0.850 | 0.800 to 0.900 | {second} | 1.000 | 1.000 | 5 | 1.0 | 7 | 90 |  |"


def test_the_shares_of_several_settings_are_one_table_with_gaps_where_a_rival_is_missing():
    setting = {"rows": 2912, "entries": 1_308_702}
    base, ours = ({"perplexity": x, "elsewhere": y, "bytes": 0} for x, y in ((10.0, 20.0), (8.0, 21.0)))
    alone = {"setting": setting, "memory": {"base": base}}
    head, _, first, second = plots.share_table([[alone | {"LoRA": {"LoRA": ours}}] * 2, [alone]]).split("\n")
    assert head == "|  | 2,912 rows, 1,308,702 entries, 2 seeds | elsewhere | 2,912 rows, 1,308,702 entries, 1 seed | elsewhere |"
    assert first == "| base | 1.000 | 1.000 | 1.000 | 1.000 |" and second == "| LoRA | 0.800 | 1.050 |  |  |"


def test_the_original_has_its_own_settings_whatever_the_others_have(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(rivals.script, "run", lambda options: asked.append(options) or (_ for _ in ()).throw(InterruptedError))
    bench = SimpleNamespace(folder=tmp_path, given=["--context", "16", "--batch_size", "4", "--max_length", "512"])
    with pytest.raises(InterruptedError):
        rivals.original_rows(bench)
    wanted = rivals.script.ORIGINAL | {"max_length": 128, "batch_size": 16}
    assert {name: getattr(asked[0], name) for name in wanted} == wanted


def test_a_model_beside_itself_scores_as_the_base_does(base, windows):
    scores = tuned.score_pair(base, base, windows, 2)
    assert np.array_equal(scores["base"], scores["memory"]) and scores["opinions"][:, 4] == pytest.approx(0, abs=1e-5)
    assert scores["base"] == pytest.approx(rules.base_scores(base, windows, 3), abs=1e-4)


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "all weights"])
def test_tuning_raises_the_likelihood_of_its_text_and_leaves_the_base_alone(base, windows, lora):
    before = rules.base_scores(base, windows, 2).mean()
    model, trained, steps, _ = tuned.tune(base, windows, 2.0, 1e-3, lora)
    assert rules.base_scores(model, windows, 2).mean() > before + 0.05 and steps > 2
    assert rules.base_scores(base, windows, 2).mean() == before
    assert (trained < sum(p.numel() for p in base.model.parameters())) == lora


def test_knn_scores_are_those_of_the_report_at_its_own_settings(base, windows):
    keys, values = torch.randn(1100, base.width).half().numpy(), np.arange(1100, dtype=np.int32) % 512
    store = Datastore(*build_index(keys, "Flat"), values, values, values, [])
    table = retrieval.knn_table(base, store, windows, 2.0, 2)
    hidden = base.hidden(torch.tensor([windows[0].ids]))[0, windows[0].skip:-1]
    targets, shared = entries_of(windows).values[:len(hidden)], [f for f in evaluation.TEMPERATURES if f in retrieval.FACTORS]
    told = evaluation.knn_log_probabilities(store, hidden, targets, retrieval.NEIGHBOURS[2], 2.0)
    ours = [2 * len(retrieval.FACTORS) + retrieval.FACTORS.index(factor) for factor in shared]
    assert len(shared) > 3 and np.isfinite(told).any()
    assert np.exp(table[:len(hidden), ours]) == pytest.approx(np.exp(told[:, np.isin(evaluation.TEMPERATURES, shared)]), abs=1e-4)


@pytest.mark.parametrize(("index", "device"), [("IVF16,SQfp16", None), ("PCA16,IVF16,SQ8", "cpu")])
def test_the_speed_of_an_index_is_measured_at_the_recall_asked_for(index, device, tmp_path, capsys):
    given = {"entries": 3000, "width": 24, "index": index, "recall": 0.9, "k": 8, "sample": 100, "work": tmp_path}
    given |= {"device": device} if device else {}
    neighbours.main([word for name, value in given.items() for word in (f"--{name}", str(value))])
    *_, heading, _, row, _, last = capsys.readouterr().out.strip().split("\n")
    found = json.loads(last)
    assert 0.8 < found["recall"] <= 1 and 1 <= found["nprobe"] < found["lists"] == 16
    exact = max(found["exact_queries_a_second"], found["faiss_exact_queries_a_second"])
    assert found["times_as_fast"] == pytest.approx(found["queries_a_second"] / exact)
    assert row.startswith(f"| {index} | {found['nprobe']} of 16 | {found['recall']:.3f} |")
    assert heading.count("|") == row.count("|")


def test_clustered_keys_are_the_same_for_one_seed_and_near_others_of_their_cluster(tmp_path):
    for name in "ab":
        neighbours.write_clustered(tmp_path / name, 2000, 40, 3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    keys = np.fromfile(tmp_path / "a", np.float16).reshape(2000, 40).astype(np.float32)
    apart = np.sort(((keys[:100, None] - keys[None]) ** 2).sum(-1), 1)
    assert np.median(apart[:, 1]) < 0.3 * np.median(apart[:, 1000])


def test_the_growth_of_the_stages_is_measured_at_every_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages_bench, "SEARCHED", 2048)
    monkeypatch.setattr(stages_bench, "STEPS", 3)
    stages_bench.main(["one", "--entries", "3000", "--width", "32", "--work", str(tmp_path)])
    heading, _, row, _, last = capsys.readouterr().out.strip().split("\n")
    found = json.loads(last)
    assert found["index"] == "Flat" and found["recall"] == 1 and found["search_seconds"] > 0 < found["training_peak_gib"]
    assert heading.count("|") == row.count("|") == len(found) + 1


def test_the_arithmetic_of_a_step_grows_with_the_width_of_the_keys():
    more = stages_bench.step_arithmetic(576) - stages_bench.step_arithmetic(288)
    assert more == 6 * stages_bench.BATCH * stages_bench.WINDOW * 288 * 256

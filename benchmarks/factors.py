"""What matters, one factor at a time: script 1 with one setting changed, same rows, same number of passes.

    python benchmarks/factors.py --data DATA      # half an hour on two cores; results/factors.json
"""

import math

import common
import numpy as np
from baselines import log_probabilities, texts_of
from common import record, recorded, replaced, script
from transformers import get_constant_schedule_with_warmup

import evaluation
from datastore import SEARCH_CHUNK, BaseLM, Datastore, windows_of
from memory_decoder import MemoryDecoder

DEFAULT = {"max_examples": 150, "max_length": 256, "batch_size": 4}
HELD_ROWS = 60
FACTORS = {
    "default": {},
    "context 1": {"context": 1},
    "context 16": {"context": 16},
    "post-norm": {"norm": "post"},
    "post-norm, lr 1e-4": {"norm": "post", "decoder_lr": 1e-4},
    "kl_weight 0": {"kl_weight": 0.0},
    "dropout 0": {"dropout": 0.0},
    "random head": {"head_init": "random"},
    "uniform votes": {"knn_temperature": math.inf},
    "lr 1e-4": {"decoder_lr": 1e-4},
    "lr 3e-3": {"decoder_lr": 3e-3},
    "kl_weight 1": {"kl_weight": 1.0},
    "one entry a row, 30 passes": {"positions": "last", "num_epochs": 30},
    "K 1024": {"k": 1024},
    "K 8": {"k": 8},
    "K 128": {"k": 128},
    "batch 16": {"batch_size": 16},
    "kl_weight 0.25": {"kl_weight": 0.25},
    "kl_weight 0.75": {"kl_weight": 0.75},
    "lr 3e-4": {"decoder_lr": 3e-4},
    "weight decay 0.1": {"weight_decay": 0.1},
    "weight decay 0.5": {"weight_decay": 0.5},
    "weight decay 2": {"weight_decay": 2.0},
    "64 topics": {"topic": 64},
    "topics, one a window": {"topic": 10_000},
}


def find_neighbours_and_self(store, keys, k, folder):
    """As find_neighbours, with the entry itself and the rest of its example among them."""
    found = [store.search(keys[i:i + SEARCH_CHUNK], k) for i in range(0, len(keys), SEARCH_CHUNK)]
    np.save(folder / "neighbours_D.npy", np.concatenate([D for D, _ in found]))
    np.save(folder / "neighbours_I.npy", np.concatenate([I for _, I in found]).astype(np.int32))


def inner_tap(given):
    """The memory reads the state after 4 of the 5 layers; the base that it is mixed with is whole."""
    cut = common.shortened_base(given, 4)
    metrics = common.train(given, "factor_tap", HELD_ROWS, **DEFAULT, base_model=cut)
    base, whole, path = BaseLM.load(cut), BaseLM.load(given.base_model), given.work / "factor_tap"
    windows = windows_of(base, texts_of(given, "validation", HELD_ROWS), common.TEMPLATE, DEFAULT["max_length"])
    decoder, temperature = MemoryDecoder.load(path / "memory_decoder.pt"), metrics["training_knn_temperature"]
    samples = evaluation.score_positions(base, decoder, evaluation.sample_windows(base, DEFAULT["max_length"]))
    scores = evaluation.score_positions(base, decoder, windows, 16, Datastore.open(path), 32, temperature)
    scores["base"] = log_probabilities(whole, windows)
    mixed = evaluation.summarise(scores, samples, temperature)
    # A blend of logits, and the gate's look at both predictions, would need both models at once.
    return metrics | {"held_out": mixed["held_out"] | {"blend_logits": None, "blend_auto": None}, "chosen": mixed["chosen"]}


def measure(given, name, run):
    if name not in recorded("factors"):
        metrics = run()
        keep = {key: metrics[key] for key in ("held_out", "chosen", "seconds", "entries")}
        record("factors", name, keep | {"commit": common.COMMIT})


def main():
    given = common.arguments(__doc__.split("\n")[0])
    with replaced(script, "get_cosine_schedule_with_warmup", lambda optimizer, warm, total:
                  get_constant_schedule_with_warmup(optimizer, warm)):
        measure(given, "constant rate", lambda: common.train(given, "factor_constant", HELD_ROWS, **DEFAULT))
    with replaced(script, "find_neighbours", find_neighbours_and_self):
        measure(given, "own example among neighbours", lambda: common.train(given, "factor_own", HELD_ROWS, **DEFAULT))
    measure(given, "tap after layer 4 of 5", lambda: inner_tap(given))
    for name, changed in FACTORS.items():
        measure(given, name, lambda changed=changed: common.train(given, "factors", HELD_ROWS, **DEFAULT | changed))


if __name__ == "__main__":
    main()

"""The time of a token: base alone, with the memory, with the automatic alpha, and of the original's way to make one.

    python benchmarks/pace.py --model_dir demo/trained_models    # with nothing else running
    python benchmarks/pace.py --model_dir demo/trained_models --compile

All ways take turns, token by token. Prints medians in milliseconds, and as the last line JSON with
base_ms, memory_ms, auto_ms, generate_ms and more. "base" and the memory's ways share one loop. "generate" is transformers' own,
with a model as transformers loads it.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import app
from base_model import BaseLM, RowLinear
from chat import Chat
from generation import AUTO, Reading, Settings, blend, opinions
from memory_decoder import read_manifest
from neighbours import seconds_of

QUESTION = "Can my landlord keep my deposit if I left the flat as it was and paid every month?"


class Pace:
    """A Chat and its ways of writing. Each way is a generator that yields after every token."""

    def __init__(self, chat, plain, tokens):
        """plain: the base again, as transformers loads it."""
        self.chat, self.model, self.base, self.plain, self.tokens = chat, chat.model, chat.model.base, plain, tokens

    def prompt(self, length):
        """The ids of a prompt of about this many tokens: the question, again and again."""
        whole = self.base.encode(self.chat.template.prompt(" ".join([QUESTION] * (length // 15 + 1))))
        return whole if length >= len(whole) else [*whole[:length - 8], *whole[-8:]]

    @torch.no_grad()
    def alone(self, ids):
        """The base by itself: forward, head, the likeliest token."""
        cache, new = self.base.new_cache(), torch.tensor([ids])
        for _ in range(self.tokens):
            token = int(self.base.logits(self.base.hidden(new, cache)[0, -1]).argmax())
            yield token
            new = torch.tensor([[token]])

    def with_memory(self, ids, automatic=False):
        """Base and memory, blended, the likeliest token."""
        reading = Reading(self.base)
        steps = self.model.steps(ids, reading, weigh=automatic)
        _, base, memory = next(steps)
        for _ in range(self.tokens):
            alpha = float(self.model.gate.alpha(opinions(base, memory).cpu().numpy(), reading.evidence.means)) if automatic else 0.5
            token = int(blend(base, memory, alpha, "probabilities" if automatic else "logits").argmax())
            yield token
            _, base, memory = steps.send(token)

    def on_the_page(self, ids):
        """As the page writes: sampled under the automatic alpha, with candidates."""
        settings = Settings(rule=AUTO, temperature=0, no_repeat=8)
        prompt = self.base.tokenizer.decode(ids[1:])
        yield from self.model.stream(prompt, settings, self.tokens)

    def generate(self, ids):
        """transformers' own loop. Yields once for the first token and once for all others."""
        for count in (1, self.tokens):
            window = torch.tensor([ids], device=self.base.device)
            self.plain.generate(window, attention_mask=torch.ones_like(window), max_new_tokens=count, min_new_tokens=count,
                                do_sample=False, pad_token_id=self.base.eos)
            yield count

    @torch.no_grad()
    def original(self, ids):
        """The original demo's way: two whole forwards of the base and a search that nobody reads, for every token."""
        for _ in range(3):
            window = torch.tensor([ids], device=self.base.device)
            logits = self.base.model(window, use_cache=False).logits[0, -1].float()
            hidden = self.base.model(window, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1].float()
            self.chat.store.search(hidden[None].cpu().numpy(), 32)
            memory = self.model.decoder.log_probabilities(self.model.decoder.features(hidden[None, None])[0, 0], logits)
            token = int(blend(logits, memory, 0.5).argmax())
            yield token
            ids = [*ids, token]


def as_loaded(model):
    """A BaseLM's model with the layers that transformers gave it."""
    for module in model.modules():
        if type(module) is RowLinear:
            module.__class__ = nn.Linear
    return model


def each_token(pace, rounds, length):
    """{way: the median milliseconds of a token} behind a prompt of so many tokens.

    The ways take turns token by token, since a shared machine changes its pace from second to second.
    """
    ids, times = pace.prompt(length), {}
    ways = {"base": pace.alone, "memory": pace.with_memory, "auto": lambda ids: pace.with_memory(ids, True),
            "page": pace.on_the_page, "original": pace.original}
    for number in range(rounds + 1):  # the first round warms up
        writing = {name: way(ids) for name, way in ways.items()}
        for token in range(pace.tokens):
            for name, way in list(writing.items()):
                seconds, more = seconds_of(lambda way=way: next(way, None))
                if more is None:
                    del writing[name]
                else:
                    times.setdefault(name, []).extend([1000 * seconds] if number and token else [])
        both = pace.generate(ids)
        first, whole = (seconds_of(lambda both=both: next(both))[0] for _ in range(2))
        times.setdefault("generate", []).extend([1000 * (whole - first) / (pace.tokens - 1)] if number else [])
    return {name: statistics.median(found) for name, found in times.items()}


def second_turn(pace, rounds, length):
    """Milliseconds to the first token of a second turn behind `length` tokens: the conversation kept read, and read again."""
    base, times = pace.base, ([], [])
    first, more = pace.prompt(length), base.encode(QUESTION)[1:]
    for number in range(rounds + 1):
        reading = Reading(base)
        next(pace.model.steps(first, reading, weigh=True))
        for kept, found in zip((reading, None), times, strict=True):
            seconds, _ = seconds_of(lambda kept=kept: next(pace.model.steps([*first, *more], kept, weigh=True)))
            found += [1000 * seconds] if number else []
    return tuple(map(statistics.median, times))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_dir", default="demo/trained_models")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each way writes")
    parser.add_argument("--rounds", type=int, default=5, help="times that each way writes them")
    parser.add_argument("--lengths", type=int, nargs=2, default=[64, 512], help="tokens of the short and of the long prompt")
    parser.add_argument("--dtype", help="number format of the base; default: that of the training")
    parser.add_argument("--compile", action="store_true", help="as app.py --compile")
    given = parser.parse_args()
    manifest = read_manifest(given.model_dir)
    if manifest is None:
        sys.exit(f"Nothing is trained yet in {given.model_dir}; name a memory with --model_dir.")
    manifest["dtype"] = given.dtype or manifest["dtype"]
    options = app.parse_options(["--model_dir", given.model_dir, *["--compile"] * given.compile])
    pace = Pace(Chat.open(options, manifest), as_loaded(BaseLM.load(manifest["base_model"], manifest["dtype"]).model), given.tokens)
    short, long = (each_token(pace, given.rounds, length) for length in given.lengths)
    kept, again = second_turn(pace, given.rounds, given.lengths[1])
    print(f"| ms a token | behind {given.lengths[0]} tokens | behind {given.lengths[1]} |\n|---|---:|---:|")
    for name in short:
        print(f"| {name} | {short[name]:.2f} | {long[name]:.2f} |")
    ratios = {"memory / base": short["memory"] / short["base"], "auto / base": short["auto"] / short["base"],
              "base / generate": short["base"] / short["generate"], "second turn, kept / read again": kept / again,
              f"original / memory behind {given.lengths[0]}": short["original"] / short["memory"],
              f"original / memory behind {given.lengths[1]}": long["original"] / long["memory"]}
    print("\n| ratio | |\n|---|---:|\n" + "\n".join(f"| {name} | {value:.2f} |" for name, value in ratios.items()))
    print(json.dumps({f"{name}_ms": round(value, 3) for name, value in short.items()}
                     | {f"{name}_ms_long": round(value, 3) for name, value in long.items()}
                     | {"second_turn_kept_ms": round(kept, 2), "second_turn_again_ms": round(again, 2),
                        "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()

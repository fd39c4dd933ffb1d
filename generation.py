"""Generation with a memory: the blend with the base model, automatic alpha, sampling, and the stream of tokens.

Letters as in memory_decoder.py: B sequences, T positions, H width of hidden states, C width of the decoder, V vocabulary.
"""

import codecs
import math
import re
import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import NoRepeatNGramLogitsProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from base_model import Literal
from datastore import knn_weights
from memory_decoder import LOGITS_AT_ONCE, DecoderCache
from support.command import UserError
from texts import shared_prefix

RULES = ("logits", "probabilities")
AUTO = "auto"  # the rule under which a Gate chooses alpha, token by token, and probabilities are mixed
KNN = "kNN-LM"  # the rule under which the search itself is the memory, and probabilities are mixed
BEST = 10  # candidates in a Step from each of base, memory and blend
BYTE_FALLBACK = re.compile("<0x[0-9A-F]{2}>")  # a byte's name in vocabularies such as Llama's and Gemma's
BYTE_LEVEL = {name: byte for byte, name in bytes_to_unicode().items()}  # bytes by their names in vocabularies such as GPT-2's


def blend(base, memory, alpha, rule="logits"):
    """Blended logits (..., V) of two predictions (..., V), both log probabilities. These are logits with one constant taken off.

    logits: (1 - alpha) * base + alpha * memory, the original demo's formula.
    probabilities: log((1 - alpha) * exp(base) + alpha * exp(memory)), the paper's.
    """
    if rule == "logits":
        return (1 - alpha) * base + alpha * memory
    assert rule == "probabilities", rule
    if alpha in (0, 1):
        return memory if alpha else base
    return torch.logaddexp(base + math.log(1 - alpha), memory + math.log(alpha))


def opinions(base, memory):
    """A Gate's features (..., 5) of log probabilities (..., V): entropies in nats, log top probabilities, KL(memory || base)."""
    p, q = memory.exp(), base.exp()
    return torch.stack([-(q * base).sum(-1), -(p * memory).sum(-1), base.amax(-1), memory.amax(-1),
                        (p * (memory - base)).sum(-1)], -1)


class Evidence:
    """How much better the memory has predicted the text so far than the base, in nats a token.

    Three running means (3,) of log p_memory(token) - log p_base(token), of about 2, 10 and 50 tokens. Recent tokens count
    most. 0 before the first token.
    """

    DECAYS = np.array([0.6, 0.9, 0.98])
    MOST = 5.0  # nats at which one token's difference is clipped

    def __init__(self):
        self.means, self.gains = np.zeros(3), []

    def add(self, gain):
        self.gains.append(gain)
        self.means = self.DECAYS * self.means + (1 - self.DECAYS) * min(max(gain, -self.MOST), self.MOST)

    def cut(self, count):
        """Forget all but the first `count` tokens."""
        gains = self.gains[:count]
        self.__init__()
        for gain in gains:
            self.add(gain)


class Reading:
    """What base and memory have read of one conversation, so that its next question is not read from the beginning.

    ids: the tokens read. evidence: of these tokens, where it is weighed.
    """

    def __init__(self, base):
        self.base = base
        self.forget(None)

    def forget(self, kind):
        """Have read nothing yet. kind: what the caches hold, since texts read in another way cannot go on from them."""
        self.kind, self.ids, self.evidence = kind, [], Evidence()
        self.cache, self.memory_cache = self.base.new_cache(), DecoderCache()

    def begin(self, ids, header, kind):
        """Keep what was read and is in ids too, but for its last token. Returns how many tokens that is.

        header: leading ids that the memory does not read.
        """
        kept = min(shared_prefix(ids, self.ids), len(ids)) - 1
        # A read that failed has left the caches longer than ids.
        if kept <= header or kind != self.kind or self.cache.get_seq_length() != len(self.ids):
            self.forget(kind)
            return 0
        try:
            self.cache.crop(kept - len(self.ids))
        except RuntimeError:  # a sliding window that is full has dropped what it would need to go back
            self.forget(kind)
            return 0
        self.memory_cache.cut(kept - header)
        self.evidence.cut(kept - header)  # also of the token that is read again
        self.ids = self.ids[:kept]
        return kept


class Gate:
    """Automatic alpha: at each position a logistic function of eight features that need no extra forward pass.

    The features are the five `opinions` on the next token and the three means of Evidence from the tokens before it.
    """

    def __init__(self, weights, bias):
        self.weights, self.bias = np.asarray(weights, np.float64), float(bias)

    def alpha(self, opinions, evidence):
        """The memory's share (...,) for opinions (..., 5) and evidence (..., 3)."""
        z = np.concatenate([opinions, evidence], -1) @ self.weights + self.bias
        return 1 / (1 + np.exp(-np.clip(z, -30, 30)))


def sample(logits, temperature, top_k, generator=None):
    """One token id from logits (V,), sampled among the top_k after dividing by temperature. Temperature 0 takes the best."""
    if temperature < 1e-4:  # dividing by less may give infinities
        return int(logits.argmax())
    best, ids = torch.topk(logits, min(top_k, logits.shape[-1]))
    weights = torch.softmax(best / temperature, dim=-1).cpu()
    return int(ids[torch.multinomial(weights, 1, generator=generator)])


@dataclass
class Settings:
    """How an answer is written. Settings are read at every token, so a change acts from the next token on."""

    alpha: float = 0.5  # the memory's share, except under the rule auto
    rule: str = "logits"  # read only when the answer begins
    temperature: float = 0.7
    top_k: int = 50
    no_repeat: int = 0  # no run of this many tokens may come twice in an answer; 0: any may
    knn_k: int = 32  # neighbours under the rule kNN-LM
    knn_temperature: float = 1.0  # temperature under the rule kNN-LM, in squared distance


@dataclass
class Step:
    """One generated token, as the page shows it. Probabilities are taken before temperature and top-k."""

    token: int
    text: str  # text that became visible; may be empty while a character or a stop text is incomplete
    base: float  # probability of the token under the base model,
    memory: float  # under the memory,
    blended: float  # and under their blend
    alpha: float  # the memory's share in that blend
    candidates: list  # (id, base, memory, blend) of the BEST tokens of each and of the token itself, the blend's best first
    cut: float  # probability, under the blend, of the last token that top-k keeps
    hidden: torch.Tensor  # the query state (H,) float32, on the CPU
    seconds: float  # that the token took


class MemoryAugmentedLM:
    """A frozen base model with a MemoryDecoder beside it."""

    def __init__(self, base, decoder, template=None, gate=None, store=None):
        """template: of the texts that the memory was trained on. gate: chooses alpha under the rule auto, if there is one.

        store: the Datastore that the rule kNN-LM searches, if there is one.
        """
        if (decoder.sizes["hidden_size"], decoder.sizes["vocab_size"]) != (base.width, base.vocabulary):
            raise UserError(f"The memory decoder was trained for hidden size {decoder.sizes['hidden_size']} and "
                            f"{decoder.sizes['vocab_size']} tokens, but {base.name} has {base.width} and {base.vocabulary}.")
        self.base, self.decoder, self.gate, self.store = base, decoder.to(base.device).eval(), gate, store
        # Every prompt begins with the header. Its states are no entries, so the memory skips them.
        self.header = base.encode([Literal(template.header.rstrip(" "))] if template else "")
        self.ends, self.stops, self.closing = base.ends, [], ""
        if template:
            self.ends, self.stops, self.closing = template.ends(base), template.stops(base), template.closing(base)

    def skipped(self, ids):
        """How many leading ids are the header, whose states the memory does not read. One id is always left."""
        return min(shared_prefix(ids, self.header), len(ids) - 1)

    @torch.no_grad()
    def steps(self, ids, reading=None, weigh=False, search=None):
        """A generator of (hidden (H,), log probabilities (V,) of base and memory). send() it each next token id.

        Each token takes one forward pass of the base and one of the decoder, both cached. reading: what was read before, if
        anything. It goes on from there. weigh: keep its evidence. search: a function from a hidden state to the memory's log
        probabilities, used in place of the decoder.
        """
        reading, header = reading or Reading(self.base), self.skipped(ids)
        kept = reading.begin(ids, header, (weigh, search is not None))
        new, skip = ids[kept:], max(0, header - kept)
        while True:
            hidden = self.base.hidden(torch.tensor([new]), reading.cache)[0, skip:]
            base = torch.log_softmax(self.base.logits(hidden[-1]), -1)
            if search:
                memory = search(hidden[-1])
            else:
                features = self.decoder.features(hidden[None].float(), reading.memory_cache)[0]
                memory = self.decoder.log_probabilities(features[-1], base)
                if weigh:
                    self.weigh(hidden[:-1], features[:-1], torch.tensor(new[skip + 1:]), reading.evidence)
            reading.ids += new
            token = yield hidden[-1], base, memory
            if weigh:
                reading.evidence.add(float(memory[token] - base[token]))
            new, skip = [token], 0

    def search(self, hidden, settings):
        """Log probabilities (V,) of the kNN distribution at a hidden state (H,); -inf where no neighbour votes."""
        D, I = self.store.search(hidden[None].float().cpu().numpy(), min(settings.knn_k, len(self.store)))
        weights = torch.from_numpy(knn_weights(D, settings.knn_temperature)[0]).float()
        votes = torch.zeros(self.base.vocabulary).index_add_(0, torch.from_numpy(self.store.values[I[0]]).long(), weights)
        return votes.log().to(hidden.device)

    def weigh(self, hidden, features, tokens, evidence):
        """Add the prompt's tokens (T,) to the evidence. hidden (T, H), features (T, C): at the position before each token."""
        rows = max(1, LOGITS_AT_ONCE // self.base.vocabulary)
        for i in range(0, len(tokens), rows):
            block, y = slice(i, i + rows), tokens[i:i + rows, None].to(hidden.device)
            base = torch.log_softmax(self.base.logits(hidden[block]), -1)
            memory = self.decoder.log_probabilities(features[block], base)
            for gain in (memory - base).gather(1, y)[:, 0].tolist():
                evidence.add(gain)

    @torch.no_grad()
    def stream(self, prompt, settings=None, max_new_tokens=200, seed=None, kept=(), first=None, reading=None):
        """Yield a Step for each token that continues `prompt`, up to an end token, a stop text or max_new_tokens.

        prompt: as BaseLM.encode reads it. kept: token ids that begin the answer; they yield no Step. first: the id of the
        token after them, if it is not to be sampled. reading: of the conversation so far; it goes on. Raises UserError if
        prompt and answer exceed the base model's positions, or if the rule needs a gate or a datastore that is missing.
        """
        settings, ids = settings or Settings(), self.base.encode(prompt)
        self.check(settings.rule, len(ids), max_new_tokens)
        rule, generator = settings.rule, torch.Generator().manual_seed(seed) if seed is not None else None
        reading = reading or Reading(self.base)
        search = (lambda hidden: self.search(hidden, settings)) if rule == KNN else None
        decoded, visible, answer = DecodedText(self.base.tokenizer), VisibleText(self.stops, self.closing), list(kept)
        for token in kept:
            visible.add(decoded.add(token))
        began, steps = time.perf_counter(), self.steps([*ids, *kept], reading, rule == AUTO, search)
        hidden, base, memory = next(steps)
        while len(answer) < max_new_tokens:
            alpha = settings.alpha
            if rule == AUTO:
                alpha = float(self.gate.alpha(opinions(base, memory).cpu().numpy(), reading.evidence.means))
            blended = blend(base, memory, alpha, rule if rule in RULES else "probabilities")
            allowed = without_repeated_runs(blended, answer, settings.no_repeat)
            token = sample(allowed, settings.temperature, settings.top_k, generator) if first is None else first
            first = None
            answer.append(token)
            ended = token in self.ends
            text = "" if ended else decoded.add(token)
            over = ended or len(answer) == max_new_tokens
            text = visible.add(text + (decoded.flush() if over else ""))
            last = over or visible.stopped
            text += (visible.end() if ended else visible.flush()) if last else ""
            chances, candidates, cut = compare(base, memory, blended, token, settings.top_k)
            yield Step(token, text, *chances, alpha, candidates, cut, hidden.float().cpu(), time.perf_counter() - began)
            if last:
                return
            began = time.perf_counter()
            hidden, base, memory = steps.send(token)

    def check(self, rule, prompt_length, max_new_tokens):
        """Raise UserError for an answer that is too long for the base model, or a rule that this memory cannot follow."""
        if prompt_length + max_new_tokens > self.base.max_positions:
            raise UserError(f"The prompt has {prompt_length} tokens and the answer up to {max_new_tokens}, but {self.base.title} "
                            f"reads at most {self.base.max_positions}; shorten the question or lower max new tokens.")
        if rule == AUTO and self.gate is None:
            raise UserError("This memory has no automatic alpha; train it again to get one.")
        if rule == KNN and self.store is None:
            raise UserError("There is no datastore to search; choose another rule.")


def without_repeated_runs(logits, answer, length):
    """Logits (V,) with -inf for every token that would repeat a run of `length` tokens of the answer. 0: no change.

    If no token were left, as when few neighbours vote, the logits stay as they are.
    """
    if not length or not answer:
        return logits
    allowed = NoRepeatNGramLogitsProcessor(length)(torch.tensor([answer]), logits[None])[0]
    return allowed if allowed.max() > -math.inf else logits


def compare(base, memory, blended, token, top_k):
    """(the token's three probabilities, the candidates, the cut) of a Step, from three predictions (V,)."""
    chances = torch.stack([base.exp(), memory.exp(), torch.softmax(blended, -1)])  # (3, V)
    best = chances.topk(min(BEST, chances.shape[1])).indices.flatten()
    ids = torch.cat([best, torch.tensor([token], device=best.device)]).unique()
    candidates = zip(ids.tolist(), *chances[:, ids].tolist(), strict=True)
    cut = chances[2].topk(min(top_k, chances.shape[1])).values[-1]
    return chances[:, token].tolist(), sorted(candidates, key=lambda c: -c[3]), float(cut)


def token_bytes(tokenizer, token):
    """The bytes that a token adds to a text. Special tokens add none. Some tokens are pieces of a character."""
    def text_of(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    text = text_of([token])
    if "\ufffd" in text:
        name = tokenizer.convert_ids_to_tokens(token)
        if BYTE_FALLBACK.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        if BYTE_LEVEL.keys() >= set(name):
            return bytes(map(BYTE_LEVEL.get, name))
    # Decoded twice in a row, since some tokenizers leave out the space in front of a text's first word.
    return text_of([token, token])[len(text):].encode()


class DecodedText:
    """Turns tokens into text as they come, in whole characters. Bytes that are no character become U+FFFD."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token):
        """The text that this token completes; "" while a character of several bytes is incomplete."""
        return self.decoder.decode(token_bytes(self.tokenizer, token))

    def flush(self):
        """U+FFFD if the answer ends within a character, else ""."""
        return self.decoder.decode(b"", final=True)


class VisibleText:
    """Holds back what may be the beginning of a stop text, and cuts at the first whole one.

    closing: a mark that is left out where the answer ends with it.
    """

    def __init__(self, stops, closing=""):
        self.stops, self.closing, self.held, self.stopped, self.begun = tuple(stops), closing, "", False, False

    def add(self, text):
        """The text that may be shown now that `text` has been generated."""
        self.held += text
        if not self.begun:
            self.held = "\n" + self.held.lstrip()  # a stop text may come first, after any space
        cuts = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if cuts:
            self.held, self.stopped = self.held[:min(cuts)], True
            return self.flush()
        begun = [stop[:n] for stop in self.stops for n in range(1, len(stop))]
        begun += [self.closing[:n] for n in range(1, len(self.closing) + 1)]
        return self.flush(max((len(part) for part in begun if self.held.endswith(part)), default=0))

    def end(self):
        """The text held back, without the closing mark, once the answer has ended by itself."""
        self.held = self.held.removesuffix(self.closing)
        return self.flush()

    def flush(self, hold=0):
        """The text held back, except its last `hold` characters, which stay held back."""
        shown, self.held = self.held[:len(self.held) - hold], self.held[len(self.held) - hold:]
        if not self.begun:
            shown = shown.lstrip()
            self.begun = bool(shown)
        return shown

"""Generation with a memory: the blend with the base model, automatic alpha, sampling, and the stream of tokens.

Letters as in memory_decoder.py: B sequences, T positions, H width of hidden states, C width of the decoder, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import NoRepeatNGramLogitsProcessor

from base_model import Literal
from command import UserError
from memory_decoder import LOGITS_AT_ONCE, DecoderCache
from texts import shared_prefix

RULES = ("logits", "probabilities")
AUTO = "auto"  # the rule under which a Gate chooses alpha, token by token, and probabilities are mixed


def blend(base_logits, memory_logits, alpha, rule="logits"):
    """Blended logits (..., V).

    logits: (1 - alpha) * base + alpha * memory, the original demo's formula.
    probabilities: log((1 - alpha) * softmax(base) + alpha * softmax(memory)), the paper's.
    """
    if rule == "logits":
        return (1 - alpha) * base_logits + alpha * memory_logits
    assert rule == "probabilities", rule
    if alpha in (0, 1):
        return torch.log_softmax(memory_logits if alpha else base_logits, dim=-1)
    return torch.logaddexp(torch.log_softmax(base_logits, -1) + math.log(1 - alpha),
                           torch.log_softmax(memory_logits, -1) + math.log(alpha))


def opinions(base_logits, memory_logits):
    """What a Gate sees of two predictions (..., V): (..., 5) entropies in nats, log top probabilities, KL(memory || base)."""
    b, m = torch.log_softmax(base_logits, -1), torch.log_softmax(memory_logits, -1)
    p = m.exp()
    return torch.stack([-(b.exp() * b).sum(-1), -(p * m).sum(-1), b.amax(-1), m.amax(-1), (p * (m - b)).sum(-1)], -1)


class Evidence:
    """How much better the memory than the base has predicted the text so far, in nats a token, recent tokens counting most.

    Three running means (3,) of log p_memory(token) - log p_base(token), of about 2, 10 and 50 tokens; 0 before the first.
    """

    DECAYS = np.array([0.6, 0.9, 0.98])
    MOST = 5.0  # nats of one token that count

    def __init__(self):
        self.means = np.zeros(3)

    def add(self, gain):
        self.means = self.DECAYS * self.means + (1 - self.DECAYS) * min(max(gain, -self.MOST), self.MOST)


class Gate:
    """Automatic alpha: at each position a logistic function of eight features that cost nothing there.

    The features are the two `opinions` on the next token and the Evidence of the tokens before it.
    """

    def __init__(self, weights, bias):
        self.weights, self.bias = np.asarray(weights, np.float64), float(bias)

    def alpha(self, opinions, evidence):
        """The memory's share (...,) for opinions (..., 5) and evidence (..., 3)."""
        z = np.concatenate([opinions, evidence], -1) @ self.weights + self.bias
        return 1 / (1 + np.exp(-np.clip(z, -30, 30)))


def sample(logits, temperature, top_k, generator=None):
    """One token id from logits (V,), drawn among the top_k after dividing by temperature; temperature 0 takes the best."""
    if temperature < 1e-4:  # so small a divisor makes infinities
        return int(logits.argmax())
    best, ids = torch.topk(logits, min(top_k, logits.shape[-1]))
    weights = torch.softmax(best / temperature, dim=-1).cpu()
    return int(ids[torch.multinomial(weights, 1, generator=generator)])


@dataclass
class Step:
    """One generated token, as the page shows it."""

    token: int
    text: str  # what became visible: may be empty while a character or a stop text is incomplete
    base: float  # probability of the token under the base model,
    memory: float  # under the memory,
    blended: float  # and under their blend, before temperature and top-k
    alpha: float  # the memory's share in that blend
    hidden: torch.Tensor  # the query state (H,) float32, on the CPU


class MemoryAugmentedLM:
    """A frozen base model with a MemoryDecoder beside it."""

    def __init__(self, base, decoder, template=None, gate=None):
        """template: the form of what the memory was trained on. gate: what chooses alpha under the rule auto, if there is one."""
        if (decoder.sizes["hidden_size"], decoder.sizes["vocab_size"]) != (base.width, base.vocabulary):
            raise UserError(f"The memory decoder was trained for hidden size {decoder.sizes['hidden_size']} and "
                            f"{decoder.sizes['vocab_size']} tokens, but {base.name} has {base.width} and {base.vocabulary}.")
        self.base, self.decoder, self.gate = base, decoder.to(base.device).eval(), gate
        # Every prompt begins with the header. Its states were no entries in training, so the memory skips them.
        self.header = base.encode([Literal(template.header.rstrip(" "))] if template else "")
        self.ends, self.stops = (template.ends(base), template.stops(base)) if template else (base.ends, [])

    def skipped(self, ids):
        """How many leading ids are the header, whose states the memory does not read; one id is always left."""
        return min(shared_prefix(ids, self.header), len(ids) - 1)

    @torch.no_grad()
    def steps(self, ids, evidence=None):
        """A generator of (hidden (H,), base logits (V,), memory log probabilities (V,)); send() it each next token id.

        One base forward and one decoder forward for each token, both with caches. evidence: gathers what the tokens say.
        """
        cache, memory_cache = self.base.new_cache(), DecoderCache()
        new, skip = torch.tensor([ids]), self.skipped(ids)
        while True:
            hidden = self.base.hidden(new, cache)[0, skip:]
            features = self.decoder.features(hidden[None].float(), memory_cache)[0]
            if evidence is not None:
                self.weigh(hidden[:-1], features[:-1], new[0, skip + 1:], evidence)
            base_logits = self.base.logits(hidden[-1])
            memory = self.decoder.log_probabilities(features[-1], base_logits)
            token = yield hidden[-1], base_logits, memory
            if evidence is not None:
                evidence.add(float(memory[token] - torch.log_softmax(base_logits, -1)[token]))
            new, skip = torch.tensor([[token]]), 0

    def weigh(self, hidden, features, tokens, evidence):
        """Add to the evidence what base and memory gave each token (T,) of the prompt; hidden (T, H), features (T, C)."""
        rows = max(1, LOGITS_AT_ONCE // self.base.vocabulary)
        for i in range(0, len(tokens), rows):
            block, y = slice(i, i + rows), tokens[i:i + rows, None].to(hidden.device)
            base_logits = self.base.logits(hidden[block])
            memory = self.decoder.log_probabilities(features[block], base_logits)
            for gain in (memory - torch.log_softmax(base_logits, -1)).gather(1, y)[:, 0].tolist():
                evidence.add(gain)

    @torch.no_grad()
    def stream(self, prompt, alpha=0.5, temperature=0.7, top_k=50, max_new_tokens=200, rule="logits", seed=None,
               no_repeat=0):
        """Yield a Step for each token that continues `prompt`, to an end token, a stop text of the template, or max_new_tokens.

        prompt: what BaseLM.encode reads. rule auto: the gate chooses each token's alpha in place of the one given, and
        probabilities are mixed. no_repeat: length in tokens of the runs that may not come twice in an answer; 0: any may.
        Raises UserError when prompt and answer exceed the base model's positions, or when
        there is no gate for auto.
        """
        base, ids = self.base, self.base.encode(prompt)
        if len(ids) + max_new_tokens > base.max_positions:
            raise UserError(f"The prompt has {len(ids)} tokens and the answer up to {max_new_tokens}, but {base.name} "
                            f"reads at most {base.max_positions}; shorten the question or lower max new tokens.")
        if rule == AUTO and self.gate is None:
            raise UserError("This memory has no automatic alpha; train it again to get one.")
        evidence = Evidence() if rule == AUTO else None
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        without_runs, answer = NoRepeatNGramLogitsProcessor(no_repeat) if no_repeat else None, []
        decoded, visible, steps = DecodedText(base.tokenizer), VisibleText(self.stops), self.steps(ids, evidence)
        hidden, base_logits, memory = next(steps)
        for number in range(1, max_new_tokens + 1):
            if rule == AUTO:
                alpha = float(self.gate.alpha(opinions(base_logits, memory).cpu().numpy(), evidence.means))
            blended = blend(base_logits, memory, alpha, "probabilities" if rule == AUTO else rule)
            allowed = without_runs(torch.tensor([answer], dtype=torch.long), blended[None])[0] if answer and no_repeat else blended
            token = sample(allowed, temperature, top_k, generator)
            answer.append(token)
            ended = token in self.ends
            text = visible.add("" if ended else decoded.add(token))
            last = ended or visible.stopped or number == max_new_tokens
            chances = [float(torch.softmax(z, -1)[token]) for z in (base_logits, memory, blended)]
            yield Step(token, text + (visible.flush() if last else ""), *chances, alpha, hidden.float().cpu())
            if last:
                return
            hidden, base_logits, memory = steps.send(token)


class DecodedText:
    """Turns tokens into text as they come, in whole characters.

    tokenizers.decoders.DecodeStream does the same but raises on bytes that are no UTF-8, which a model may well sample.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.text, self.waiting = tokenizer, [], "", 0

    def add(self, token):
        """The text that this token completes; "" while a character of several bytes is incomplete."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.waiting += 1
        if text.endswith("\ufffd") and self.waiting < 4:  # no character has more than four bytes
            return ""
        new, self.text, self.waiting = text[len(self.text):], text, 0
        return new


class VisibleText:
    """Holds back what may be the beginning of a stop text, and cuts at the first whole one."""

    def __init__(self, stops):
        self.stops, self.held, self.stopped, self.begun = tuple(stops), "", False, False

    def add(self, text):
        """The text that may be shown now that `text` has been generated."""
        self.held += text
        if not self.begun:
            self.held = "\n" + self.held.lstrip()  # a stop text may come first, whatever space stood before it
        cuts = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if cuts:
            self.held, self.stopped = self.held[:min(cuts)], True
            return self.flush()
        hold = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        return self.flush(hold)

    def flush(self, hold=0):
        """What is held back but for the last `hold` characters; all of it once no more text can come."""
        shown, self.held = self.held[:len(self.held) - hold], self.held[len(self.held) - hold:]
        if not self.begun:
            shown = shown.lstrip()
            self.begun = bool(shown)
        return shown

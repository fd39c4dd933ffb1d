"""Parts of the page as HTML: an answer's tokens, a token's candidates, passages, three voices, the memory itself.

Every text of a user, a model or a dataset goes through html.escape.
"""

import html
import math

from chat import VOICES
from evaluation import HELD_OUT_ROWS
from generation import AUTO, KNN
from web.records import NAMES

COLOURINGS = {
    "memory's effect": ("effect", "blue: the memory made the token less probable", "orange: it made it more probable"),
    "alpha": ("alpha", "clear: the base decided", "orange: the memory decided"),
    "surprise": ("surprise", "clear: the blend expected the token", "purple: it did not"),
    "plain": ("plain", "", ""),
}
MOST_NATS = 5.0  # at which a colour is full
NO_ANSWER = "The model ended its answer at once. Ask in other words, or choose another rule or alpha."
SHOWN = 10  # candidates
MUTE = ' aria-label="no text"'
CSS = """
:root { --color-accent: #4f46e5; } .dark { --color-accent: #a5b4fc; }  /* contrast on the page's ground */
.answer { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; padding: .2em .1em; }
.token { border-radius: 4px; padding: 1px 0; cursor: pointer; }
.token:hover, .token:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 0; }
.token.open { outline: 2px solid var(--body-text-color); }
.token.kept { opacity: .55; }
.token.end::after, .token.silent::after { content: "·"; border: 1px solid var(--border-color-primary); border-radius: 4px;
  font-size: .8em; padding: 0 .4em; }
.token.end::after { content: "end"; margin-left: .3em; }
.effect .token { background: rgb(from var(--hue) r g b / calc(var(--effect) * 55%)); }
.alpha .token { background: rgb(234 120 20 / calc(var(--alpha) * 55%)); }
.surprise .token { background: rgb(140 70 220 / calc(var(--surprise) * 50%)); }
.more { --hue: rgb(234 120 20); } .less { --hue: rgb(40 110 230); }
.legend { display: flex; flex-wrap: wrap; gap: .2em 1.2em; font-size: .85em; align-items: center; }
.legend i { display: inline-block; width: 6em; height: .8em; border-radius: 3px; }
.legend .effect { background: linear-gradient(90deg, rgb(40 110 230 / 55%), transparent, rgb(234 120 20 / 55%)); }
.legend .alpha { background: linear-gradient(90deg, transparent, rgb(234 120 20 / 55%)); }
.legend .surprise { background: linear-gradient(90deg, transparent, rgb(140 70 220 / 50%)); }
.facts { font-size: .85em; color: color-mix(in srgb, var(--body-text-color) 75%, transparent); }
.panel h2, .voice h2, .about h2 { margin: .2em 0 .4em; font-size: 1em; font-weight: 600; }
.candidates { width: 100%; border-collapse: collapse; font-size: .9em; table-layout: fixed; }
.candidates th { text-align: left; font-weight: 600; font-size: .9em; padding: 2px 4px; }
.candidates td { padding: 3px 4px; border-top: 1px solid var(--border-color-primary); vertical-align: middle; }
.candidates col.word { width: 34%; }
.candidates button { font-family: var(--font-mono); white-space: pre; text-align: left; width: 100%; overflow: hidden;
  text-overflow: ellipsis; border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 1px 6px; cursor: pointer;
  background: var(--background-fill-secondary); color: var(--body-text-color); }
.candidates button:hover { border-color: var(--color-accent); }
.candidates tr.chosen button { font-weight: 700; border-color: var(--body-text-color); }
.candidates tr.out { opacity: .75; }
.candidates tr.cut td { border-top: 2px dashed var(--body-text-color-subdued); }
.bar { display: block; height: .5em; border-radius: 2px; min-width: 1px; }
.base .bar { background: rgb(110 120 135); } .memory .bar { background: rgb(234 120 20); }
.blended .bar { background: rgb(40 110 230); }
.passage { border-left: 3px solid var(--color-accent); padding: 0 0 0 .7em; margin: 0 0 .9em; font-size: .92em;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.passage mark { background: rgb(234 120 20 / 30%); color: inherit; border-radius: 3px; padding: 0 2px; font-weight: 600; }
.passage small { color: color-mix(in srgb, var(--body-text-color) 75%, transparent); display: block; }
/* A plot with a label is taller than Gradio thinks, and its legend would be cut off. */
#about .block:has(.vega-embed) { overflow: visible !important; margin-bottom: 2.5em; }
.voices { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17em), 1fr)); gap: 1em; }
.voice { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .7em .9em; }
.about table { border-collapse: collapse; margin: .5em 0 1em; }
.about td, .about th { text-align: left; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--border-color-primary); }
.scroll { overflow-x: auto; }
"""
# Clicks, Enter and the arrow keys on tokens; Escape stops from anywhere on the page.
TOKENS_JS = """
const choose = target => {
    const token = target.closest('[data-number]');
    if (token) trigger('select', {number: Number(token.dataset.number)});
};
element.addEventListener('click', event => choose(event.target));
element.addEventListener('keydown', event => {
    const token = event.target.closest('[data-number]');
    if (!token) return;
    if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); choose(token); }
    const way = {ArrowRight: 'nextElementSibling', ArrowLeft: 'previousElementSibling'}[event.key];
    if (way && token[way]) { event.preventDefault(); token[way].focus(); }
});
document.addEventListener('keydown', event => {
    if (event.key === 'Escape') document.querySelectorAll('.stop').forEach(button => button.click());
});
"""
NEWS_JS = """
element.addEventListener('click', event => {
    if (event.target.closest('button')) trigger('select', {});
});
"""
# A page of another memory has another id. Until it is there, the address does not answer.
LOAD_JS = """async () => {
    const asked = () => fetch(`${window.gradio_config.root}/gradio_api/app_id`)
        .then(answer => answer.ok || answer.status === 401 ? answer.text() : null).catch(() => null);
    const before = await asked();
    clearInterval(window.loading);
    window.loading = setInterval(async () => {
        const now = await asked();
        if (before && now && now !== before) { clearInterval(window.loading); location.reload(); }
    }, 1000);
}"""
CANDIDATES_JS = """
element.addEventListener('click', event => {
    const button = event.target.closest('[data-token]');
    if (button) trigger('select', {number: Number(button.dataset.number), token: Number(button.dataset.token)});
});
"""


def tokens(answer, colouring="effect", opened=None, clickable=True):
    """The tokens of an answer in one colouring. Tokens taken over from an earlier answer are pale."""
    if not answer.tokens:
        return '<div class="answer">…</div>'
    spans = [token_span(number, token, number < answer.kept, number == opened, clickable)
             for number, token in enumerate(answer.tokens)]
    note = "" if answer.text.strip() else f'<div class="facts">{NO_ANSWER}</div>'
    return f'<div class="answer {colouring}">{"".join(spans)}</div>{note}'


def token_span(number, token, kept, opened, clickable):
    effect = math.log(max(token["blended"], 1e-12)) - math.log(max(token["base"], 1e-12))
    surprise = -math.log(max(token["blended"], 1e-12))
    words = ["token", "more" if effect >= 0 else "less", *(["kept"] if kept else []), *(["open"] if opened else [])]
    text = token["text"]
    if not text:  # the style sheet draws a mark, so that a copied answer does not contain it
        words.append("end" if token["end"] else "silent")
    word = text.lstrip(" ") or text
    space = text[:len(text) - len(word)]  # not coloured, since it may stand at the end of a line
    style = f"--effect:{part(abs(effect))};--alpha:{token['alpha']:.2f};--surprise:{part(surprise)}"
    about = f"base {percent(token['base'])}, memory {percent(token['memory'])}, blend {percent(token['blended'])}"
    first = 0 if number == 0 or opened else -1  # Tab goes to one token, the arrow keys to the others
    button = f' role="button" tabindex="{first}" data-number="{number}"{"" if text else MUTE}' if clickable else ""
    return f'{space}<span class="{" ".join(words)}" style="{style}" title="{about}"{button}>{html.escape(word)}</span>'


def part(nats):
    return f"{min(1.0, nats / MOST_NATS):.2f}"


def percent(chance):
    return f"{100 * chance:.1f}%" if chance >= 0.0005 or chance == 0 else "under 0.1%"


def legend(colouring):
    name, low, high = COLOURINGS[colouring]
    scale = f'<span>{low}</span><i class="{name}"></i><span>{high}</span>' if low else ""
    return f'<div class="legend">{scale}<span>Click a token to open it.</span></div>'


def alpha_of(settings):
    return "alpha chosen at each token" if settings.rule == AUTO else f"alpha {settings.alpha:g}"


def facts(answer, stopped=False):
    """One line about how an answer was made."""
    settings, count = answer.settings, len(answer.tokens) - answer.kept
    search = f", {settings.knn_k:d} neighbours searched at every token" if settings.rule == KNN else ""
    return (f'<div class="facts">{"stopped after " if stopped else ""}{count} tokens, {answer.speed:.1f} a second; the memory '
            f"changed the first choice at {answer.changed:.0%} of them. Rule {html.escape(settings.rule)}, {alpha_of(settings)}"
            f"{search}, seed {answer.seed:d}.</div>")


def candidates(answer, number):
    """The ten best candidates of one token under base, memory and blend. A click on one continues the answer with it."""
    token = answer.tokens[number]
    if "candidates" not in token:
        return '<div class="panel facts">The candidates of this token were not kept. Ask again to see them.</div>'
    shown = sorted(token["candidates"], key=lambda c: -max(c[name] for name in NAMES))[:SHOWN]
    if all(c["id"] != token["id"] for c in shown):
        shown[-1] = next(c for c in token["candidates"] if c["id"] == token["id"])
    shown.sort(key=lambda c: -c["blended"])
    rows, within = [], True
    for c in shown:
        out = c["blended"] < token["cut"]
        rows.append(candidate_row(c, number, c["id"] == token["id"], out, cut=out and within))
        within = not out
    rest = "".join(f"<td>{percent(max(0.0, 1 - sum(c[name] for c in shown)))}</td>" for name in NAMES)
    kept = " (taken over)" if number < answer.kept else ""
    name = visible(token["text"] or next(c["text"] for c in token["candidates"] if c["id"] == token["id"]))
    return (f'<div class="panel scroll"><h2>Token {number + 1}{kept}: “{name}”, alpha {token["alpha"]:.2f}</h2>'
            '<table class="candidates"><colgroup><col class="word"><col><col><col></colgroup>'
            "<thead><tr><th>go on with</th><th>base</th><th>memory</th><th>blend</th></tr></thead>"
            f'<tbody>{"".join(rows)}<tr><td>all others</td>{rest}</tr></tbody></table>'
            '<div class="facts">Before temperature and top-k. Bold: the token of the answer.'
            f'{" Below the dashed line: cut off by top-k." if not within else ""} Click another to go on from it.</div></div>')


def candidate_row(candidate, number, chosen, out, cut):
    words = " ".join([*(["chosen"] if chosen else []), *(["out"] if out else []), *(["cut"] if cut else [])])
    cells = "".join(f'<td class="{name}">{percent(candidate[name])}<span class="bar" style="width:{100 * candidate[name]:.1f}%">'
                    "</span></td>" for name in NAMES)
    return (f'<tr class="{words}"><td><button data-number="{number}" data-token="{candidate["id"]:d}">'
            f'{visible(candidate["text"])}</button></td>{cells}</tr>')


def visible(text):
    """A token's text with visible spaces and line ends."""
    inner = text.strip(" ")
    before, _, after = text.partition(inner) if inner else (text, "", "")
    return html.escape((before.replace(" ", "␣") + inner + after.replace(" ", "␣")).replace("\n", "⏎"))


def passages(found, heading):
    """Passages, as Chat.passages returns them, under a heading."""
    if not found:
        return ""
    blocks = [f'<div class="passage">{html.escape(p["before"])}<mark>{visible(p["token"])}</mark>{html.escape(p["after"])}'
              f'<small>{html.escape(p["title"][:120])} · squared distance {p["distance"]:.3g} · weight {percent(p["weight"])}'
              "</small></div>" for p in found]
    return f'<div class="panel"><h2>{html.escape(heading)}</h2>{"".join(blocks)}</div>'


def voices(answers, colouring="effect"):
    """Three answers side by side."""
    def box(name, answer):
        return (f'<div class="voice"><h2>{name} <span class="facts">{alpha_of(answer.settings)}</span></h2>'
                f"{tokens(answer, colouring, clickable=False)}"
                f'<div class="facts">{len(answer.tokens)} tokens, {answer.speed:.1f} a second; first choice changed by the memory '
                f"at {answer.changed:.0%}</div></div>")
    return f'<div class="voices">{"".join(map(box, VOICES, answers))}</div>'


def about(chat):
    """The memory in figures, from its artefacts."""
    metrics = chat.metrics
    held = metrics["held_out"]
    sources = [source["name"] for source in chat.manifest.get("sources", [])]
    known = [("base model", chat.model.base.title), ("sources", ", ".join(dict.fromkeys(sources))),
             ("texts", f"{len(chat.store.examples):,}"), ("entries", f"{len(chat.store):,}"),
             ("tokens seen", f"{len(chat.model.decoder.seen):,} of {chat.model.base.vocabulary:,}"),
             ("index", f"{metrics['index']}; training found {metrics['index_recall']:.1%} of the {metrics['k']} nearest"),
             ("memory", f"{sum(p.numel() for p in chat.model.decoder.parameters()) / 1e6:.1f} million parameters"),
             ("training", ", ".join(f"{name} {seconds:.0f} s" for name, seconds in metrics["seconds"].items()))]
    return ('<div class="about scroll"><h2>This memory</h2><table>'
            + "".join(f"<tr><th scope=row>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in known)
            + f"</table><h2>Held-out text: {held['positions']:,} tokens that no entry comes from</h2><table>"
            "<tr><th>predicted by</th><th>perplexity</th><th>of the base's</th></tr>"
            + "".join(f"<tr><td>{name}</td><td>{held[key]:.2f}</td><td>{held[key] / held['base']:.2f}</td></tr>"
                      for name, key in HELD_OUT_ROWS.items()) + "</table></div>")

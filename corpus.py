"""The text of a memory: its sources, its examples and what is held out. Text can be added and forgotten."""

from dataclasses import dataclass, replace

import numpy as np

from datastore import read_examples
from sources.rows import check_enough, document, read_rows, split_rows, telltale
from sources.tables import in_smaller_parts, read_table
from support.command import UserError
from texts import Template, usual_template

HELD_OUT = "held_out.jsonl"


@dataclass
class Corpus:
    """The examples that a memory is made of, and those that it is tested on."""

    sources: list  # {"name", "template"} of each
    examples: list  # Examples to train on
    held: list  # Examples that no entry comes from

    @classmethod
    def read(cls, options):
        """The Corpus of the dataset that the options of script 1 name."""
        table = in_smaller_parts(read_table(options.dataset, options.split))
        pattern = typed(options.template) if options.template else usual_template(table.columns)
        template, held = Template.parse(pattern, columns=table.columns), None
        if options.validation_dataset or options.validation_split:
            source = options.validation_dataset or options.dataset
            held = read_rows(read_table(source, options.validation_split), template)
            held = [example._replace(name=f"validation/{example.name}") for example in held]
        examples = read_rows(table, template)
        tell_unused(table, template)
        examples, held = split_rows(examples, held, template, options.validation_fraction, options.max_examples, options.seed,
                                    options.dataset)
        print(f"examples: {len(examples)} to learn; held out to test on: {few_of([e.name for e in held])}", flush=True)
        return cls([{"name": table.name, "template": template.pattern}], examples, held)

    @classmethod
    def open(cls, folder, manifest):
        """The Corpus of a folder of artefacts."""
        return cls(manifest["sources"], read_examples(folder / "examples.jsonl"), read_examples(folder / HELD_OUT))

    def templates(self, base):
        """The Template of each source, with the words of a base model's chat template."""
        return [Template.parse(source["template"], base) for source in self.sources]

    def fitting(self, base):
        """This Corpus, or one with plain words for its last source if that needs a chat template and the base has none."""
        template = Template.parse(self.sources[-1]["template"])
        if base.tokenizer.chat_template or template.whole_chats or not template.pattern.startswith("chat "):
            return self
        question, answer = template.fields
        plain = f"Question: {{{question}}}\nAnswer: {{{answer}}}"
        print(f"template: {plain.replace(chr(10), ' ')}; {base.name} has no chat template", flush=True)
        return replace(self, sources=[*self.sources[:-1], self.sources[-1] | {"template": plain}])

    def added(self, source, split=None, pattern=None):
        """The Corpus with one more source. Raises UserError if it holds that source already.

        Without a pattern the source is read as the first one was, if it has the columns for that.
        """
        table, first = read_table(source, split), Template.parse(self.sources[0]["template"])
        if pattern is None:
            there = {field if field in table.columns else field.split(".")[0] for field in first.fields} <= set(table.columns)
            pattern = first.pattern if there else usual_template(table.columns)
        template = Template.parse(typed(pattern), columns=table.columns)
        new = read_rows(table, template, len(self.sources))
        names = {document(example.name) for example in [*self.examples, *self.held]}
        known = sorted(names & {document(example.name) for example in new})
        if known:
            raise UserError(f"This memory holds {known[0]} already; --forget it first, or give the file another name.")
        grown = replace(self, sources=[*self.sources, {"name": table.name, "template": template.pattern}])
        held = grown.unlike(new, self.held)
        if len(held) < 2:
            raise UserError(f"The text of {source} is what this memory holds out to test on, and too little of that would be left.")
        return replace(grown, examples=[*self.examples, *new], held=held)

    def unlike(self, some, others):
        """Those of the others that share no telltale text with some Examples."""
        def texts(example):
            return set(telltale(example.row, Template.parse(self.sources[example.source]["template"])))
        known = set().union(*map(texts, some))
        return [example for example in others if not known & texts(example)]

    def without(self, name, seed):
        """The Corpus without a document, a row (table:row), a table or a folder. Raises UserError if there is none."""
        def gone(example):
            return example.name == name or example.name.startswith((f"{name}:", f"{name.rstrip('/')}/")) \
                or self.sources[example.source]["name"] == name

        examples, held = ([e for e in part if not gone(e)] for part in (self.examples, self.held))
        if len(examples) + len(held) == len(self.examples) + len(self.held):
            there = sorted({document(e.name) for e in [*self.examples, *self.held]})
            raise UserError(f"This memory holds nothing of the name {name}; it holds {few_of(there)}.")
        while len(held) < 2 < len(examples):  # a report needs two
            held.append(examples.pop(int(np.random.default_rng(seed).integers(len(examples)))))
            examples = self.unlike(held[-1:], examples)
        check_enough(len(examples), len(held), "that is left")
        return Corpus(self.sources, examples, held)


def few_of(names):
    """Some of the names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def typed(pattern):
    r"""A typed template, with \n and \t as a newline and a tab."""
    return pattern.replace(r"\n", "\n").replace(r"\t", "\t")


def tell_unused(table, template):
    """Print the template, and the columns of the table that it does not use."""
    fields = {field.split(".")[0] for field in template.fields} | set(template.fields)
    unused = [name for name in table.columns if name not in fields]
    form = " ".join(template.pattern.split("\n"))
    print(f"template: {form}" + (f"; not used: {', '.join(unused)}" if unused else ""), flush=True)

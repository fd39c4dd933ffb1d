"""The files of the wrong inputs: datasets, base models and memories that are damaged, empty or of another kind."""

import gzip
import json
import os
import pickle
import shutil

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file

from datastore import read_examples
from support.sealed import sealed, unsealed

NOISE = bytes((i * 7919 + 13) % 256 for i in range(4096)) + b"\xff\xfe\xfa"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
ROW = {"Title": "Rent", "Question": "May I keep a cat?", "Answer": "Only if the lease does not forbid it, so read it first."}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def numbered(count):
    return [{name: f"{text} {i}" for name, text in ROW.items()} for i in range(count)]


def chats(*messages):
    return lines([{"messages": list(messages)}] * 9)


TEXTS = {
    "empty.jsonl": "", "empty.json": "", "empty.csv": "", "empty.tsv": "", "empty.parquet": "", "empty.txt": "", "empty.md": "",
    "empty.pdf": "", "blank.jsonl": "\n \n\t\n", "blank.csv": "\n\n\n", "blank.txt": " \n\n ", "pointer.jsonl": POINTER,
    "broken_line.jsonl": lines(numbered(9)) + '{"Title": "x",\n', "broken.json": '{"rows": [', "broken_list.json": "[{},",
    "deep.json": "[" * 200_000, "deep.jsonl": '{"a":' * 100_000 + "1" + "}" * 100_000 + "\n", "numbers.jsonl": "1\n2\n3\n",
    "lists.jsonl": '["a"]\n["b"]\n', "null.json": "null", "number.json": "3", "text.json": '"text"',
    "objects_without_fields.jsonl": "{}\n" * 9, "other_fields.jsonl": lines([{"a": "x", "b": "y"}] * 9),
    "empty_fields.jsonl": lines([dict.fromkeys(ROW, "")] * 9), "nested.jsonl": lines([ROW | {"Answer": {"a": "x"}}] * 9),
    "nested_lists.jsonl": lines([ROW | {"Answer": [["x"]]}] * 9), "mixed.jsonl": lines([*numbered(9), ROW | {"Answer": {"b": 1}}]),
    "one.jsonl": lines(numbered(1)), "two.jsonl": lines(numbered(2)), "three.jsonl": lines(numbered(3)),
    "all_the_same.jsonl": lines([ROW] * 40), "nan.jsonl": '{"Title": [NaN], "Question": [1], "Answer": [Infinity]}\n' * 9,
    "surrogate_fields.jsonl": '{"\\ud800": "x", "b": "y"}\n' * 9, "huge_line.jsonl": '{"Question": "' + "x" * 5_000_000 + "\n",
    "two_columns_of_one_name.csv": "Question,Question,Answer\na,b,c\n" * 5, "too_many_values.csv": "Question,Answer\na,b,c,d\n" * 5,
    "open_quote.csv": 'Question,Answer\n"a,b\nc,d\n', "header.csv": "Question,Answer\n",
    "chats_without_content.jsonl": chats({"role": "user"}, {"role": "assistant", "content": None}),
    "chats_of_texts.jsonl": lines([{"messages": ["hello", "there"]}] * 9), "chats_empty.jsonl": lines([{"messages": []}] * 9),
    "chats_of_numbers.jsonl": chats({"role": "user", "content": 3}),
    "chats_refused.jsonl": chats({"role": 5, "content": "x"}, {"role": "assistant", "content": "y"}),
    "sharegpt_wrong.jsonl": lines([{"conversations": [{"from": "human", "text": "x"}]}] * 9), "rows.xlsx": "x", "rows": "x",
    "new\nline.jsonl": "", "other.jsonl": lines(numbered(12)), "stages_is_a_file/stages": "mine",
    "lock_is_a_folder/stages/.lock/mine": "", "folder.jsonl/x": "", "pictures/a.png": "x", "short_texts/a.txt": "Hello.",
    "texts/a.txt": "Hello there.\n\n" * 200, "chats.jsonl": chats({"role": "user", "content": "a"}, {"role": "assistant",
                                                                                                     "content": "b"}),
    "broken_pdf_folder/a.pdf": "%PDF-1.4 nothing more", "layout_broken/README.md": "---\nconfigs: 3\n---\n",
    "layout_broken/data.jsonl": lines(numbered(9)), "saved_broken/state.json": "{", "saved_broken_dict/dataset_dict.json": "{}"}
BYTES = {**{f"binary.{kind}": NOISE for kind in ("jsonl", "json", "csv", "parquet", "txt", "pdf", "jsonl.gz")},
         "truncated.jsonl.gz": gzip.compress(lines(numbered(99)).encode(), mtime=0)[:-30],
         "mark.csv": b"\xef\xbb\xbf", "nothing.csv.gz": gzip.compress(b"", mtime=0),
         "latin.csv": "Question,Answer\ncafé,thé\n".encode("latin-1"), "odd_utf16.csv": b"\xff\xfea",
         "latin_texts/a.txt": "Café à la carte. ".encode("latin-1") * 99}


def make_files(folder, rows, model, memory):
    """Fill a folder with all that the tables name. rows: a file of good rows. model: its base model. memory: what they trained."""
    for name, content in [*((name, text.encode()) for name, text in TEXTS.items()), *BYTES.items()]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "empty_folder").mkdir()
    os.symlink("loop", folder / "loop")
    os.mkfifo(folder / "pipe")
    shutil.copyfile(rows, folder / "rows.jsonl")
    (folder / "held_out.jsonl").write_text(lines(example.row for example in read_examples(memory / "held_out.jsonl")))
    make_parquet(folder)
    make_models(folder / "models", model)
    make_memories(folder / "memories", memory)


def make_parquet(folder):
    write, table = pyarrow.parquet.write_table, pyarrow.table
    write(table({name: [text] * 99 for name, text in ROW.items()}), folder / "truncated.parquet")
    whole = (folder / "truncated.parquet").read_bytes()
    (folder / "truncated.parquet").write_bytes(whole[:len(whole) // 2])
    write(table({"question": [b"\xff"] * 9, "answer": [b"\xfe"] * 9}), folder / "bytes.parquet")
    write(table({"question": [{"a": 1}] * 9, "answer": [[1]] * 9}), folder / "nested.parquet")
    write(table({"question": pyarrow.array([], pyarrow.string()), "answer": pyarrow.array([], pyarrow.string())}),
          folder / "no_rows.parquet")
    write(table({}), folder / "no_columns.parquet")
    bytes_of_no_text = [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    no_text = pyarrow.Array.from_buffers(pyarrow.string(), 1, bytes_of_no_text)
    write(table({"question": no_text, "answer": ["a"]}), folder / "no_utf8.parquet")
    write(table({"question": pyarrow.array([10**12], pyarrow.timestamp("s")), "answer": ["a"]}), folder / "far_date.parquet")


# What a copy of the good model has in place of a part of its config.json.
CONFIGS = {
    "unknown_type": {"model_type": "nonsense"}, "own_code": {"model_type": "nonsense", "auto_map": {"AutoModel": "x.Y"}},
    "masked": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "classifier": {"architectures": ["GemmaForSequenceClassification"]},
    "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "other_shapes": {"hidden_size": 64},
    "negative_width": {"hidden_size": -32}, "text_width": {"hidden_size": "wide"}, "no_heads": {"num_attention_heads": 0},
    "nan_width": {"hidden_size": float("nan")}, "huge_vocabulary": {"vocab_size": 10**15}, "no_layers": {"num_hidden_layers": 5},
    "text_vocabulary": {"vocab_size": "many"}, "short": {"max_position_embeddings": 32}}
# A file of a copy of the good model, and what it holds instead.
CONTENTS = {
    "broken_config": ("config.json", "{"), "list_config": ("config.json", "[]"), "empty_config": ("config.json", "{}"),
    "broken_tokenizer": ("tokenizer.json", '{"version": "1.0"'), "empty_tokenizer": ("tokenizer.json", "{}"),
    "pointer": ("model.safetensors", POINTER), "zero_weights": ("model.safetensors", "")}
GONE = {"no_tokenizer": "tokenizer*", "no_config": "config.json", "no_weights": "*.safetensors"}


def make_models(folder, model):
    def copy(name):
        return shutil.copytree(model, folder / name)

    for name, more in CONFIGS.items():
        path = copy(name) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    for name, (file, content) in CONTENTS.items():
        (copy(name) / file).write_text(content)
    for name, pattern in GONE.items():
        for path in copy(name).glob(pattern):
            path.unlink()
    whole = (model / "model.safetensors").read_bytes()
    for name, content in (("half_weights", whole[:len(whole) // 2]), ("tenth_weights", whole[:len(whole) // 10]),
                          ("header_only", whole[:8]), ("flipped_header", bytes([whole[0] ^ 255]) + whole[1:])):
        (copy(name) / "model.safetensors").write_bytes(content)
    make_other_kinds(folder, copy)
    make_gguf(folder)


def make_other_kinds(folder, copy):
    """Models whose fault is not in one file's text, and folders that hold no model."""
    for name, value in (("nan_weights", float("nan")), ("infinite_weights", float("inf")), ("other", None)):
        path = copy(name) / "model.safetensors"
        weights = load_file(path)
        save_file({key: weight + 0.01 if value is None else torch.full_like(weight, value) for key, weight in weights.items()},
                  path,
                  {"format": "pt"})
    settings = copy("no_eos") / "tokenizer_config.json"
    settings.write_text(json.dumps({name: value for name,
                                    value in json.loads(settings.read_text()).items() if name != "eos_token"}))
    for name in ("generation_config.json", "config.json"):
        path = folder / "no_eos" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    (folder / "no_eos/chat_template.jinja").unlink()
    tokens = copy("tokenizer_of_other_size") / "tokenizer.json"
    found = json.loads(tokens.read_text())
    found["added_tokens"].append(found["added_tokens"][0] | {"id": 600, "content": "the", "special": False})
    tokens.write_text(json.dumps(found))
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    for name, content in (("missing_shards", json.dumps(index)), ("broken_index", "{")):
        (copy(name) / "model.safetensors").unlink()
        (folder / name / "model.safetensors.index.json").write_text(content)
    for name, content in (("pickled", pickle.dumps(os.getcwd)), ("damaged_pickle", NOISE)):
        (copy(name) / "model.safetensors").unlink()
        (folder / name / "pytorch_model.bin").write_bytes(content)
    for name, file, content in (("adapter", "adapter_config.json", '{"base_model_name_or_path": "owner/base"}'),
                                ("pipeline", "model_index.json", "{}"), ("dataset", "data.jsonl", lines(numbered(3))),
                                ("new\nline", "config.json", "{")):
        (folder / name).mkdir()
        (folder / name / file).write_text(content)
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    os.symlink("loop", folder / "loop")
    os.mkfifo(folder / "pipe")


def make_gguf(folder):
    (folder / "folder.gguf").mkdir()
    for name, content in (("empty", b""), ("magic", b"GGUF"), ("truncated", b"GGUF\x03\0\0\0" + bytes(8) + b"\x09" + bytes(7)),
                          ("other", b"PK\x03\x04" + NOISE), ("version", b"GGUF\xff\0\0\0" + bytes(64))):
        (folder / f"{name}.gguf").write_bytes(content)


def make_memories(folder, memory):
    """Copies of a memory with one thing wrong."""
    def copy(name):
        return shutil.copytree(memory, folder / name, ignore=shutil.ignore_patterns("stages"))

    for name, content in (("empty_manifest", ""), ("list_manifest", "[]"), ("broken_manifest", '{"files": {')):
        (copy(name) / "config.json").write_text(content)
    (copy("no_decoder") / "memory_decoder.pt").unlink()
    (copy("no_index") / "faiss_index.bin").unlink()
    (copy("empty_decoder") / "memory_decoder.pt").write_bytes(b"")
    (copy("other_rows") / "examples.jsonl").write_text("[]\n")
    path = copy("other_values") / "config.json"
    path.write_text(sealed(unsealed(path) | {"base_fingerprint": "0" * 16}))
    (copy("folder_for_file") / "metrics.json").unlink()
    (folder / "folder_for_file/metrics.json").mkdir()

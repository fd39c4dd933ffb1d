"""Files, folders of documents, datasets of the hub -> tables of records, with values as they stand there."""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow.parquet

from support import hub
from support.command import UserError, one_line, whole_text

PART = 4000  # characters of a document that are one example, at most
LEAST_PART = 200  # smaller limit for little text: an example never learns from itself, so there must be several
FEWEST, ENOUGH = 4, 8  # with fewer parts than FEWEST, documents are cut smaller until there are ENOUGH
MESSAGES = "messages"  # the field of a chat, as TRL names it
TEXT = "text"  # the field of a document


class Table(NamedTuple):
    """Records of one source, before any field is chosen."""

    name: str
    columns: list
    fetch: Callable  # fetch(some columns) -> list of dicts; other columns are never converted
    names: list | None = None  # of the records, where they have names
    texts: dict | None = None  # name -> whole text, of documents


def read_table(source, split=None):
    """The Table of a file, a folder, or a dataset of the hub.

    source: a .json, .jsonl, .csv, .tsv or .parquet file; a .txt, .md or .pdf document, or a folder of them; a folder that
    datasets saved; a hub id, or a folder in the hub's layout. The last two end in :configuration if there are several.
    split: default "train". Raises UserError for what cannot be read.
    """
    return with_whole_chats(read_source(source, split))


def read_source(source, split):
    path = Path(os.path.expanduser(source))  # unlike Path.expanduser, leaves ~x alone if there is no user x
    if path.is_file():
        if split:
            raise UserError(f"The file {source} has no splits; leave the split out.")
        return read_file(path)
    if path.is_dir():
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            return read_saved(path, split)
        documents, tables = files_of_kind(path, DOCUMENTS), files_of_kind(path, TABLES)
        notes = [file for file in documents if file.name != "README.md"]
        # Beside other files, a README.md only describes them. A JSON file among documents is seldom a table.
        if (notes and all(kind_of_file(file) == ".json" for file in tables)) or (documents and not notes and not others_in(path)):
            if split:
                raise UserError(f"The folder {source} holds documents and has no splits; leave the split out.")
            tell_left_out(tables, documents)
            return read_documents(path.name, documents, path)
        tell_left_out(notes, tables)
    return read_layout(source, split)


def tell_left_out(files, others):
    if files:
        print(f"left out: {one_and_more(files)}, beside {one_and_more(others)}", flush=True)


def others_in(folder):
    """Whether a folder holds more than its README.md."""
    return any(file.is_file() and file.name != "README.md" and not file.name.startswith(".") for file in folder.rglob("*"))


def kind_of_file(path):
    """The suffix of a file, without .gz."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def with_whole_chats(table):
    """The table with its chats in the field MESSAGES: TRL's prompt and completion joined, or ShareGPT's conversations."""
    def whole(columns):
        return [{MESSAGES: together([record.get(name) for name in found])} for record in table.fetch(found)]

    for found in (["prompt", "completion"], ["conversations"]):
        if set(found) <= set(table.columns) and MESSAGES not in table.columns and is_chat(first_value(table, found[0])):
            others = [name for name in table.columns if name not in found]
            return Table(table.name, [MESSAGES, *others], lambda names: whole(names) if MESSAGES in names else table.fetch(names),
                         table.names)
    return table


def together(values):
    """Several chats as one chat. A value that is no chat is returned as it is; reading it reports the error."""
    wrong = [value for value in values if value and not is_chat(value)]
    return wrong[0] if wrong else [message for value in values for message in value or []]


def first_value(table, column):
    return next((record[column] for record in table.fetch([column]) if record.get(column)), None)


def is_chat(value):
    """Whether a value is a list of messages in TRL's form or ShareGPT's."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & set(value[0]))


def one_and_more(files):
    return files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def files_of_kind(folder, kinds):
    """Files below a folder with one of the suffixes, sorted by name. Hidden files are left out."""
    return sorted(file for file in folder.rglob("*") if kind_of_file(file) in kinds and file.is_file()
                  and not any(part.startswith(".") for part in file.relative_to(folder).parts))


def read_file(path, kind=None):
    """The Table of one file. kind: its suffix, if the name does not have it."""
    kind = kind or kind_of_file(path)
    if kind in DOCUMENTS:
        return read_documents(path.name, [path], path.parent)
    if kind not in TABLES:
        raise UserError(f"The file {path} is of no kind that is read; give {', '.join(sorted(TABLES | DOCUMENTS))} "
                        "or a folder of documents.")
    if path.stat().st_size == 0:
        raise UserError(f"The dataset file {path} is empty.")
    try:
        return TABLES[kind](path)
    except (ValueError, csv.Error, OSError, RecursionError) as error:
        raise UserError(f"The dataset file {path} cannot be read: {reason(error)}.") from None


def reason(error):
    return one_line(error).rstrip(".") or type(error).__name__


def decoded(path):
    """The text of a file, unpacked if it is a gzip file."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"The file {path} cannot be unpacked: {reason(error)}.") from None
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"The file {path} is a Git LFS pointer and not the data; run `git lfs pull`, or download it again.")
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"The file {path} is not UTF-8 text (at byte {error.start}); save it as UTF-8 (a spreadsheet calls it "
                        "'CSV UTF-8').") from None


def table_of(name, records):
    """A Table of dicts in memory."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    return Table(name, columns, lambda _: records)


class Number(str):
    """A number as it is written."""


def parse_json(text):
    """The value of a JSON text, with its numbers as they are written."""
    return json.loads(text, parse_int=Number, parse_float=Number, parse_constant=Number)


def read_json(path):
    """The Table of a JSON file: a list of objects, an object that holds one, or an object a line."""
    text = decoded(path)
    try:
        found = parse_json(text)
    except json.JSONDecodeError:
        if text.lstrip().startswith("["):
            raise
        return read_json_lines(path)
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict)
                 and not is_chat(value)]
        found = lists[0] if len(lists) == 1 else [found]
    return table_of(path.name, objects(path, found if isinstance(found, list) else [found], "item"))


def read_json_lines(path):
    """The Table of a file with one JSON object a line."""
    found = []
    for number, line in enumerate(decoded(path).split("\n"), 1):  # str.splitlines would also cut at U+2028
        if line.strip():
            try:
                found.append(parse_json(line))
            except json.JSONDecodeError as error:
                raise UserError(f"The dataset file {path} cannot be read: line {number} is no JSON ({error}).") from None
    return table_of(path.name, objects(path, found, "line"))


def objects(path, found, noun):
    """The records, after checking that each is an object."""
    wrong = next((number for number, record in enumerate(found, 1) if not isinstance(record, dict)), None)
    if wrong or not found:
        what = f"{noun} {wrong} is no object" if wrong else "its list is empty"
        raise UserError(f"The dataset file {path} holds no rows: {what}; "
                        'wanted are objects such as {"question": "...", "answer": "..."}.')
    return found


def read_csv(path):
    """The Table of a CSV file with a header. Values are separated by commas, semicolons or tabs."""
    text = decoded(path)
    if not text.strip():
        raise UserError(f"The dataset file {path} is empty.")
    header = text.split("\n", 1)[0]
    mark = "\t" if ".tsv" in path.suffixes else max(",;\t", key=header.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    csv.field_size_limit(2**31 - 1)  # the highest limit that every system takes
    columns, records = [name.strip() for name in next(lines)], []
    twice = [name for name in columns if name and columns.count(name) > 1]
    if twice:
        raise UserError(f"The dataset file {path} has two columns {twice[0]}; rename one.")
    for values in lines:
        if len(values) > len(columns):
            raise UserError(f"The dataset file {path} has {len(values)} values in line {lines.line_num} and {len(columns)} "
                            "columns; put quotes around a value that holds a separator.")
        records.append(dict(zip(columns, values, strict=False)))
    return Table(path.name, columns, lambda _: records)


def read_parquet(path):
    """The Table of a Parquet file."""
    def read(columns):
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read(columns)

    with pyarrow.parquet.ParquetFile(path) as file:
        return arrow_table(path.name, file.schema_arrow.names, read)


def arrow_table(name, columns, read):
    """A Table whose values are converted when they are asked for. read: of some columns a pyarrow.Table."""
    def fetch(wanted):
        try:
            return read(wanted).to_pylist()
        except (ValueError, OSError, OverflowError, pyarrow.ArrowException) as error:  # a damaged value, a date in the year 300000
            raise UserError(f"The dataset {name} cannot be read: {reason(error)}.") from None
    return Table(name, columns, fetch)


TABLES = {".json": read_json, ".jsonl": read_json_lines, ".ndjson": read_json_lines, ".csv": read_csv, ".tsv": read_csv,
          ".parquet": read_parquet}


def read_text(path):
    return decoded(path).replace("\r\n", "\n")


def read_pdf(path):
    """The text of a PDF file, page after page, as datasets' own reader gives it."""
    try:
        import pdfplumber  # noqa: F401  what datasets.Pdf needs
    except ImportError:
        raise UserError(f"Reading {path} needs a package: pip install pdfplumber; or save it as text.") from None
    try:
        found = datasets.Dataset.from_dict({"pdf": [str(path)]}).cast_column("pdf", datasets.Pdf())[0]["pdf"]
        return "\n\n".join(page.extract_text() for page in found.pages)
    except Exception as error:  # a damaged PDF raises many kinds of error
        raise UserError(f"The PDF file {path} cannot be read: {reason(error)}.") from None


DOCUMENTS = {".txt": read_text, ".md": read_text, ".pdf": read_pdf}


def read_documents(name, files, folder):
    """The Table of documents, named by their path in the folder. A file is one record, or several if it is long."""
    texts = {whole_text(file.relative_to(folder).as_posix()): DOCUMENTS[kind_of_file(file)](file).strip() for file in files}
    empty = [Path(file) for file, text in texts.items() if not text]
    if empty:
        print(f"left out: {one_and_more(empty)}, without text", flush=True)
    return table_of_documents(name, {file: text for file, text in texts.items() if text}, PART)


def table_of_documents(name, texts, most):
    """The Table of documents, cut into parts of at most `most` characters. texts: name -> text."""
    parts = {file: cut(text, most) for file, text in texts.items()}
    names = [file if len(found) == 1 else f"{file}:{number}" for file, found in parts.items()
             for number in range(1, len(found) + 1)]
    records = [{TEXT: part} for found in parts.values() for part in found]
    return Table(name, [TEXT], lambda _: records, names, texts)


def in_smaller_parts(table):
    """The table, with its documents cut into smaller parts if they are too few to train on."""
    most = PART
    while table.texts and len(table.names) < (FEWEST if most == PART else ENOUGH) and most // 2 >= LEAST_PART:
        most //= 2
        table = table_of_documents(table.name, table.texts, most)
    return table


def cut(text, most):
    """The text in pieces of at most `most` characters, cut between paragraphs, else lines, sentences or words."""
    parts, begin = [], 0
    while begin < len(text):
        end = len(text)
        if end - begin > most:
            least, limit = begin + most // 2, begin + most
            ends = (text.rfind(mark, least, limit) + len(mark.rstrip()) for mark in ("\n\n", "\n", ". ", " "))
            end = next((end for end in ends if end >= least), limit)
        parts.append(text[begin:end].strip())
        begin = end
    return [part for part in parts if part]


def read_saved(path, split):
    """The Table of a folder that datasets saved to disk."""
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged files raise many kinds of error
        raise UserError(f"The saved dataset {path} cannot be read: {reason(error)}.") from None
    if isinstance(saved, datasets.DatasetDict):
        return typed(path.name, saved[the_split(path, split, saved)])
    if split:
        raise UserError(f"The saved dataset {path} has no splits; leave the split out.")
    return typed(path.name, saved)


def the_split(source, split, there):
    """The name of the split, "train" by default. Raises UserError with the existing splits if it is not one of them."""
    if (split or "train") not in map(str, there):
        raise UserError(f"The dataset {source} has no split {split or 'train'}; it has {', '.join(map(str, there))}. Name one with "
                        "--split.")
    return split or "train"


def typed(name, table):
    """The Table of a datasets.Dataset. Audio and pictures are not decoded."""
    return arrow_table(name, table.column_names, lambda columns: table.select_columns(columns).with_format("arrow")[:])


def read_layout(source, split):
    """The Table of a hub dataset, or of a folder in the hub's layout.

    JSON and CSV files are read here, since datasets would convert text that looks like a date or a number.
    """
    name, _, configuration = source.rpartition(":")
    if not name or Path(os.path.expanduser(source)).is_dir():  # a folder's own name may hold a colon
        name, configuration = source, ""
    folder = Path(os.path.expanduser(name))
    title = ":".join(filter(None, (folder.name, configuration, split)))
    if folder.is_dir():
        name = str(folder)
    elif not re.fullmatch(r"[\w-]+|[\w-]+/[\w.-]+", name) or folder.suffix.lower() in TABLES | DOCUMENTS:
        raise UserError(f"There is no file or folder {source}; check the path.")
    try:
        builder = datasets.load_dataset_builder(name, configuration or None)
        there = builder.config.data_files or builder.info.splits or datasets.get_dataset_split_names(name, configuration or None)
        split = the_split(source, split, there)
        kind = {"json": ".json", "csv": ".csv"}.get(builder.name)
        if kind and builder.config.data_files:
            urls = next(files for key, files in builder.config.data_files.items() if str(key) == split)
            if folder.is_dir() and not configuration:
                used = {Path(url).name for files in builder.config.data_files.values() for url in files}
                tell_left_out([file for file in files_of_kind(folder, TABLES) if file.name not in used], [Path(urls[0])])
            files = datasets.DownloadManager().download_and_extract(list(urls))
            return joined(title, [read_file(Path(file), kind) for file in files])
        return typed(title, datasets.load_dataset(name, configuration or None, split=split))
    except Exception as error:  # the loader raises many kinds of error, all about the named dataset
        if isinstance(error, UserError):
            raise
        raise UserError(explain_layout_error(source, name, error)) from None


def joined(name, tables):
    """One Table with all records of several."""
    return table_of(name, [record for table in tables for record in table.fetch(table.columns)])


def explain_layout_error(source, name, error):
    """One sentence for a dataset of the hub, or a folder in its layout, that could not be read."""
    if isinstance(error, ValueError) and "onfig" in str(error):
        try:
            there = datasets.get_dataset_config_names(name)
        except Exception:  # the configurations themselves are wrong
            return f"The dataset {name} has configurations that cannot be read: {reason(error)}."
        return f"The dataset {name} has several configurations: {', '.join(there)}; name one, e.g. --dataset {name}:{there[0]}."
    if Path(name).is_dir():
        return f"The folder {name} holds no dataset: {reason(error.__cause__ or error)}."
    return hub.explain("dataset", name, error) or f"The dataset {source} cannot be read: {reason(error)}."

"""Wrong datasets, templates, models, folders and environments. Each is a tuple of command-line arguments.

In front of a name, @ stands for the folder of wrong_files.py, which makes the files named here.
"""

TOO_LONG = "x" * 5000

DATA = [*(("--dataset", f"@{name}") for name in (
    "missing.jsonl", "missing", "empty.jsonl", "empty.json", "empty.csv", "empty.tsv", "empty.parquet", "empty.txt", "empty.md",
    "empty.pdf", "blank.jsonl", "blank.csv", "blank.txt", "empty_folder", "pictures", "binary.jsonl", "binary.json", "binary.csv",
    "binary.parquet", "binary.txt", "binary.pdf", "binary.jsonl.gz", "truncated.jsonl.gz", "pointer.jsonl", "latin.csv",
    "odd_utf16.csv", "broken_line.jsonl", "broken.json", "broken_list.json", "deep.json", "deep.jsonl", "numbers.jsonl",
    "lists.jsonl", "null.json", "number.json", "text.json", "objects_without_fields.jsonl", "other_fields.jsonl",
    "empty_fields.jsonl", "nested.jsonl", "nested_lists.jsonl", "mixed.jsonl", "one.jsonl", "two.jsonl", "three.jsonl",
    "all_the_same.jsonl", "nan.jsonl", "surrogate_fields.jsonl", "huge_line.jsonl", "two_columns_of_one_name.csv",
    "too_many_values.csv", "open_quote.csv", "header.csv", "truncated.parquet", "bytes.parquet", "nested.parquet",
    "no_rows.parquet",
    "no_columns.parquet", "chats_without_content.jsonl", "chats_of_texts.jsonl", "chats_empty.jsonl", "chats_of_numbers.jsonl",
    "chats_refused.jsonl", "sharegpt_wrong.jsonl", "saved_broken", "saved_broken_dict", "rows.xlsx", "rows",
    "layout_broken", "folder.jsonl", "loop", "pipe", "short_texts", "broken_pdf_folder", "latin_texts", "closed.jsonl/x",
    "new\nline.jsonl", "mark.csv", "nothing.csv.gz", "no_utf8.parquet", "far_date.parquet")),
    *(("--dataset", name) for name in ("", " ", "\n", ":", "/dev/null", "/dev/zero", "/proc/self/mem", TOO_LONG, "a/b/c",
                                       "nobody/has-this-dataset", "nobody/has-this:configuration", "https://example.org/rows.jsonl",
                                       "owner/name with space", "~nobody/rows.jsonl", "~no user/rows.jsonl",
                                       "*.jsonl", "\ud800", "C:\\rows.jsonl")),
    *(("--validation_dataset", f"@{name}") for name in ("missing.csv", "empty.jsonl", "binary.jsonl", "other_fields.jsonl",
                                                        "one.jsonl", "nested.jsonl", "empty_folder", "broken_line.jsonl"))]

TEMPLATES = [("--template", template) for template in (
    " ", "no field at all", "{Title} {Nothing}", "{}", "{0}", "{ }", "{Question} {", "{Question}}", "}{", "{{Question}}",
    "{Question!r}",
    "{Question:>9}", "{Question.text}", "{Question[0]}", "{Question}{Answer.}", "{.Answer}", "chat {Question}",
    "chat {Question} {Nothing}",
    "chat {Question} {Answer} {Title}", "chat {Question} and {Answer}", "chat {Question} {Answer} end", "chat {}",
    "chat {messages}",
    "document", "document {}", "document {Nothing}", "document {Title} {Answer}", "document {Answer} end", "{Question\n}",
    "{question} {answer}", "{Question} {{Answer}", "{" * 1000, "{Question" + "x" * 5000 + "}", "{\ud800}", "{Question} {Answer!}",
    "{Question} {Answer:}}", "Q: {Question }", "{Title}{Question}{Answer}{}")]

MODELS = [*(("--base_model", f"@models/{name}") for name in (
    "missing", "empty", "file", "no_tokenizer", "no_config", "broken_config", "list_config", "empty_config", "unknown_type",
    "own_code",
    "masked", "classifier", "quantised", "no_weights", "half_weights", "tenth_weights", "header_only", "zero_weights",
    "other_shapes",
    "flipped_header", "pointer", "missing_shards", "broken_index", "adapter", "pipeline", "dataset", "pickled", "damaged_pickle",
    "broken_tokenizer", "empty_tokenizer", "no_eos", "negative_width", "text_width", "no_heads", "nan_width", "huge_vocabulary",
    "nan_weights", "infinite_weights", "missing.gguf", "empty.gguf", "magic.gguf", "truncated.gguf", "other.gguf", "folder.gguf",
    "version.gguf", "loop", "pipe", "tokenizer_of_other_size", "no_layers", "new\nline", "text_vocabulary")),
    *(("--base_model", name) for name in ("", " ", "\n", "nowhere/at/all", "nobody/has-this-model", "-", ".", "..", "/",
                                          "/dev/null",
                                          "/dev/zero", "/proc/self", TOO_LONG, "@trained", "@rows.jsonl", "@texts", "C:\\models",
                                          "https://example.org/model", "~nobody/model", "\ud800", "owner/name:tag", "a b",
                                          "SmolLM2-135M-Instruct/", "x.gguf", "~/x.gguf", "/dev/null.gguf"))]

# (arguments of app.py --ask)
CHAT_MODELS = [*(("--model_dir", name) for name in (
    "", " ", "@missing", "@rows.jsonl", "@empty_folder", "@models/other", "@texts", "/dev/null", "/proc/self", TOO_LONG, "\ud800",
    "@memories/empty_manifest", "@memories/list_manifest", "@memories/broken_manifest", "@memories/no_decoder",
    "@memories/no_index",
    "@memories/empty_decoder", "@memories/other_values", "@memories/other_rows", "@memories/folder_for_file", "@loop", "~nobody/x",
    "new\nline")),
    *(("--base_model", name) for name in ("", "@models/other", "@models/missing", "@models/half_weights", "@models/no_tokenizer",
                                          "@models/empty.gguf", "nobody/has-this-model", "@trained", "\n", TOO_LONG))]

PATHS = [("--output_dir", name) for name in (
    "", "@rows.jsonl", "@rows.jsonl/below", "/dev/null", "/dev/null/below", "/proc/nowhere", "/proc/self/nowhere", "/sys/nowhere",
    TOO_LONG, "@" + "y" * 300, "@loop", "@loop/below", "@pipe", "@pipe/below", "@stages_is_a_file", "@lock_is_a_folder",
    "@new\nline.jsonl/rows.jsonl", "/proc/1/fd/out")]

# (variables, arguments of train_memory_decoder.py). LOCAL_RANK and the like are what `accelerate launch` sets.
TRAINING_ENVIRONMENTS = [
    ({"LOCAL_RANK": "x"}, ()), ({"LOCAL_RANK": "-7"}, ()), ({"LOCAL_RANK": ""}, ()), ({"LOCAL_RANK": "0", "WORLD_SIZE": "x"}, ()),
    ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, ()), ({"LOCAL_RANK": "0", "RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                                                    "MASTER_PORT": "1"}, ()),
    ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, ()),
    ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, ()), ({"RANK": "x"}, ("--forget", "nothing.txt")),
    ({"HOME": "/nowhere"}, ("--dataset", "~/rows.jsonl")), ({"HOME": ""}, ("--base_model", "~/model"))]

CHAT_ENVIRONMENTS = [({"MEMORY_DECODER_AUTH": value}, ()) for value in ("", "secret", ":secret", " :secret", "secret:", ":",
                                                                        "\udcff")]
CHAT_ENVIRONMENTS += [({"HOME": "/nowhere"}, ("--model_dir", "~/memory", "--ask", "Why?"))]

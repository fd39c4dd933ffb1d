"""Wrong values of the flags of both scripts, and flags that contradict each other. Each is a tuple of command-line arguments.

In front of a name, @ stands for the folder of wrong_files.py.
"""

QUESTION = "Can my landlord keep my deposit?"
NO_NUMBER = ("", "x", "1,5", "0x10", "--1", "one")
NO_WHOLE_NUMBER = (*NO_NUMBER, "1.5", "nan", "inf", "1e3")
LARGE = "9" * 30
TOO_LONG = "9" * 5000  # Python reads no whole number of so many digits

WHOLE = {"k": ("0", "-1", LARGE, "1000000"), "decoder_dim": ("0", "-32", "48", "31", "1000000000", LARGE),
         "context": ("0", "-5"), "num_epochs": ("0", "-1"), "batch_size": ("0", "-1", LARGE), "max_length": ("0", "7", "-9",
                                                                                                             "513", LARGE),
         "max_examples": ("0", "-1", "1"), "seed": ("-1", str(2**63), LARGE)}
REAL = {"decoder_lr": ("0", "-1", "nan", "inf", "1e400"), "weight_decay": ("-1", "nan", "inf", "-inf"),
        "kl_weight": ("-0.1", "1.1", "nan", "inf"), "dropout": ("1", "-0.1", "nan", "inf"),
        "validation_fraction": ("0", "1", "-1", "nan", "inf"), "recall": ("0", "1.1", "-1", "nan", "inf"),
        "knn_temperature": ("0", "-1", "nan", "-inf")}
CHOICES = {"positions": ("", "first", "ALL"), "norm": ("", "middle"), "head_init": ("", "zero"),
           "dtype": ("", "int8", "float64", "torch.float32")}
INDEX = ("", "Nonsense7", "flat", "IVF0,Flat", "IVF100000,Flat", "PCA999,Flat", "PQ7", "Flat,Flat,Flat", "IVF-1,Flat", "HNSW0",
         "IVF99999999999999999999,Flat", "PCA0,Flat", "LSH0", " ", "IVF4,PQ5x99")
DEVICES = ("", "abacus", "cuda:99", "cuda:-1", "cpu:1", "CPU", "cuda:x", "meta", "cpu:0:0", "cuda:99999999999999999999", "cpu ",
           "mps:7", "cuda,cpu", "cpu\n")
SWITCHES = ("maybe", "2", "-1.5")

TRAINING = [
    *((f"--{name}", value) for name, values in WHOLE.items() for value in (*values, *NO_WHOLE_NUMBER, TOO_LONG)),
    *((f"--{name}", value) for name, values in REAL.items() for value in (*values, *NO_NUMBER)),
    *((f"--{name}", value) for name, values in CHOICES.items() for value in values),
    *(("--index", value) for value in INDEX), *(("--device", value) for value in DEVICES),
    *((f"--{name}", value) for name in ("demo", "original") for value in SWITCHES),
    *((flag,) for flag in ("--k", "--dataset", "--template", "--nonsense", "--dataset_name", "--output", "stray", "-k", "--", "-")
      if flag != "--"),
    ("--k", "8", "9"), ("--k=",), ("--max_len", "96"), ("--K", "8"), ("--nonsense=1",), ("---k", "8"), ("--k 8",)]

CHAT = [
    *((f"--{name}", value) for name in ("seed", "max_turns", "no_repeat") for value in ("-1", "1.5", "x", "nan", "inf",
                                                                                        LARGE[:3] + "x")),
    ("--seed", str(2**31)), ("--no_repeat", "51"), ("--no_repeat", LARGE), ("--max_turns", "--1"), ("--seed", "1e400"),
    ("--seed", TOO_LONG), *(("--alpha", value) for value in ("-0.1", "1.1", "nan", "inf", "x", "", "1e400")),
    *(("--temperature", value) for value in ("-0.1", "2.1", "nan", "inf", "x", "")),
    *(("--rule", value) for value in ("", "mean", "AUTO", "logits,auto", "knn")), *(("--device", value) for value in DEVICES),
    *(("--ask", value) for value in ("", " ", "\n\t", "why " * 600, "?" * 100_000)),
    *(("--demo", value) for value in SWITCHES), *(("--open", value) for value in SWITCHES),
    *(("--compile", value) for value in SWITCHES),
    ("--ask",), ("--model_dir",), ("--nonsense",), ("stray",), ("--model", "@trained"), ("--alpha", "0.5", "0.7"), ("--k", "8")]

# Without a question, app.py would open its page.
PAGE = [
    *(("--server_port", value) for value in ("0", "-1", "65536", "x", "", "1.5", "nan", "inf", LARGE, TOO_LONG)),
    *(("--server_name", value) for value in ("", "203.0.113.7", "2001:db8::7", "x" * 70, "[::1", "[::1]:7860", "fe80::1%none",
                                             "::ffff:1.2.3.4", "..", "0.0.0.0", "\ud800")),
    *(("--auth", value) for value in ("", "secret", ":secret", " :secret", "secret:", ":", "::", "\n:x")),
    ("--open", "--auth", ""), ("--server_name", "0.0.0.0", "--auth", "x"), ("--server_name", "0.0.0.0", "--open", "no")]

# Flags that cannot go together.
PAIRS = [
    ("--split", "train"), ("--split", ""), ("--validation_split", "test"), ("--validation_dataset", "@rows.jsonl", "--split",
                                                                            "train"),
    ("--validation_dataset", "@rows.jsonl", "--validation_split", "test"), ("--validation_dataset", "@rows.jsonl"),
    ("--k", "300", "--positions", "last"), ("--max_examples", "2", "--k", "2000"),
    ("--original", "--max_examples", "3"), ("--max_examples", "1", "--validation_fraction", "0.9"),
    ("--validation_fraction", "0.999"), ("--index", "IVF200,Flat", "--positions", "last"),
    ("--batch_size", "100000", "--decoder_dim", "3200000"), ("--max_length", "64", "--base_model", "@models/short"),
    ("--template", "chat {messages}"), ("--template", "document {Question} {Answer}"),
    ("--dataset", "@chats.jsonl", "--template", "chat {question} {answer}"),
    ("--dataset", "@chats.jsonl", "--template", "Q: {messages}\\nA: {messages}"), ("--dataset", "@texts", "--split", "train")]

# --add and --forget, in a folder that holds a memory.
CHANGES = [
    ("--add", "@missing.jsonl"), ("--add", ""), ("--add", "@rows.jsonl"), ("--add", "@one.jsonl", "--k", "9"),
    ("--add", "@empty.jsonl"), ("--add", "@binary.jsonl"), ("--add", "@other.jsonl", "--dataset", "@other.jsonl"),
    ("--add", "@other.jsonl", "--max_examples", "9"), ("--add", "@other.jsonl", "--max_length", "64"),
    ("--add", "@other.jsonl", "--decoder_dim", "64"), ("--add", "@other.jsonl", "--context", "3"),
    ("--add", "@other.jsonl", "--norm", "post"), ("--add", "@other.jsonl", "--head_init", "random"),
    ("--add", "@other.jsonl", "--positions", "last"), ("--add", "@other.jsonl", "--index", "IVF2,Flat"),
    ("--add", "@other.jsonl", "--dtype", "bfloat16"), ("--add", "@other.jsonl", "--validation_fraction", "0.5"),
    ("--add", "@other.jsonl", "--validation_dataset", "@other.jsonl"), ("--add", "@other.jsonl", "--template", "{Nothing}"),
    ("--add", "@other.jsonl", "--split", "train"), ("--add", "@other.jsonl", "--base_model", "@models/other"),
    ("--add", "@held_out.jsonl"), ("--add", "nobody/has-this"), ("--forget", "nothing.txt"), ("--forget", ""),
    ("--forget", "rows.jsonl"), ("--forget", "rows.jsonl:999"), ("--forget", "rows.jsonl:0"), ("--forget", "rows"),
    ("--forget", "rows.jsonl:1\n"), ("--forget", "rows.jsonl:1", "--k", "4"), ("--forget", "rows.jsonl:1", "--seed", "x"),
    ("--forget", "rows.jsonl", "--add", "@missing.txt"), ("--forget", "rows.jsonl", "--add", "@one.jsonl"),
    ("--add", "@other.jsonl", "--decoder_lr", "nan"), ("--forget", "rows.jsonl:1", "--num_epochs", "0")]

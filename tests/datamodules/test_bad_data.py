"""Bad files end in one message that names the file, the row and the cure; nothing of them is used."""

from __future__ import annotations

import gzip
import json
import os
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nspo_lightning.datamodules import AlignmentDataModule, DataError, PromptSource, SafetyDataModule
from nspo_lightning.datamodules.sources.cells import MAX_PROMPT_CHARS
from nspo_lightning.datamodules.sources.read import usable_rows
from nspo_lightning.datamodules.sources.source import as_sources

GOOD = {"prompt": "Say a word"}
SCREEN_LINES, SCREEN_CHARS = 10, 1200


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


WHOLE_GZIP = gzip.compress(lines(*({"prompt": f"Prompt {os.urandom(20).hex()}"} for _ in range(400))))
DAMAGED_GZIP = bytearray(WHOLE_GZIP)
DAMAGED_GZIP[len(DAMAGED_GZIP) // 2] ^= 0xFF

# name, file name, bytes, where, what was found, how to mend it (a part of each)
BAD_FILES = [
    ("empty", "x.jsonl", b"", "x.jsonl", "empty (0 bytes)", "Fetch or write it again"),
    ("only white space", "x.json", b" \n\n", "x.json", "white space only", "Fetch"),
    ("only blank lines", "x.jsonl", b"\n \n", "x.jsonl", "no rows", "Fetch"),
    ("empty list", "x.json", b"[]", "x.json", "no rows", "Fetch"),
    ("csv header only", "x.csv", b"prompt\n", "x.csv", "no rows", "Fetch"),
    ("binary", "x.jsonl", b"\x7fELF\0\0\0", "line 1", "binary data", "suffix"),
    ("binary csv", "x.csv", b"prompt\nok\n\0\1\2\n", "line 3", "binary data", "suffix"),
    (
        "truncated gzip",
        "x.jsonl.gz",
        WHOLE_GZIP[: len(WHOLE_GZIP) // 2],
        "after line",
        "cut short or damaged",
        "gzip -t",
    ),
    ("damaged gzip", "x.jsonl.gz", bytes(DAMAGED_GZIP), "line", "", "ile"),
    ("gzip without its suffix", "x.jsonl", WHOLE_GZIP, "x.jsonl", "holds gzip data", "Add the suffix"),
    ("no gzip inside .gz", "x.jsonl.gz", lines(GOOD), "x.jsonl.gz", "does not hold gzip data", "Drop the suffix"),
    ("unknown suffix", "x.txt", b"Say a word\n", "x.txt", "'.txt' are not read", ".jsonl"),
    ("invalid UTF-8", "x.jsonl", lines(GOOD) + b'{"prompt": "caf\xe9"}\n', "line 2", "0xe9 at column 16", "iconv"),
    ("invalid UTF-8 in csv", "x.csv", b"prompt\ncaf\xe9\n", "line 2", "not valid UTF-8", "iconv"),
    ("UTF-16", "x.csv", "prompt\nword\n".encode("utf-16"), "line 1", "UTF-16", "UTF-8"),
    (
        "broken JSON line",
        "x.jsonl",
        lines(GOOD) + b'{"prompt": "wor\n',
        "line 2",
        "not a JSON object",
        "complete JSON object",
    ),
    (
        "JSON document as jsonl",
        "x.jsonl",
        b'[\n{"prompt": "a"}\n]',
        "line 1",
        "not a JSON object",
        "rename it to `.json`",
    ),
    ("jsonl named json", "x.json", lines(GOOD, GOOD), "line 2", "Extra data", "rename it to `.jsonl`"),
    ("JSON list cut short", "x.json", b'[{"prompt": "a"},\n', "line 2", "cut short", "Fetch"),
    ("JSON list broken", "x.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', "line 2", "not valid JSON", "Mend the JSON"),
    ("JSON trailing comma", "x.json", b'[{"prompt": "a"},\n]', "line 2", "not valid JSON", "Mend the JSON"),
    ("JSON lists in a row", "x.json", b'[{"prompt": "a"}]\n[{"prompt": "b"}]', "line 1", "more data follows", "ows"),
    ("JSON comma missing", "x.json", b'[{"prompt": "a"}\n{"prompt": "b"}]', "line 2", "expected `,`", "Mend"),
    ("rows are no objects", "x.json", b'["Say a word"]', "line 1", "a row must be an object", '{"prompt": ...}'),
    ("one row is no object", "x.jsonl", lines(GOOD, ["x"]), "line 2", "got list", '{"prompt": ...}'),
    ("JSON object of scalars", "x.json", b'{"prompt": "a"}', "x.json", "'prompt' holds str", "list of objects"),
    ("JSON number", "x.json", b"42", "x.json", "expected a list of objects, got int", "list of rows"),
    ("empty object", "x.jsonl", lines(GOOD, {}), "line 2", "no columns", "remove"),
    ("deep nesting", "x.jsonl", b"[" * 100_000, "line 1", "not a JSON object", "JSON"),
    (
        "deep nesting in a row",
        "x.jsonl",
        lines(GOOD) + b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "line 2",
        "not a JSON object",
        "JSON",
    ),
    ("deep nesting in a list", "x.json", b'[{"prompt": "a"},\n' + b"[" * 100_000, "line 2", "not valid JSON", "Mend"),
    (
        "deep nesting in an object",
        "x.json",
        b'{"data": [\n{"prompt": "a \\" [[["},\n' + b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
        "line 3",
        "not readable as JSON",
        "Mend",
    ),
    ("long number in a row", "x.jsonl", lines(GOOD) + b'{"n": 1' + b"0" * 4300 + b"}", "line 2", "4300 digits", "JSON"),
    ("long number in a list", "x.json", b'[{"prompt": "a"},\n{"n": 1' + b"0" * 4300 + b"}]", "line 2", "4300", "Mend"),
    (
        "long number in an object",
        "x.json",
        b'{"data": [{"prompt": "' + b"9" * 5000 + b'"},\n\n{"n": 1' + b"0" * 4300 + b"}]}",
        "line 3",
        "4300 digits",
        "Mend",
    ),
    ("csv without a separator", "x.csv", b"prompt;answer\na;b\n", "line 1", "separator is not ','", "commas"),
    ("csv row too long", "x.csv", b"prompt,answer\na,b\na,b,c\n", "line 3", "3 fields, but 2 columns", "Quote"),
    ("csv row too short", "x.csv", b"prompt,answer\na\n", "line 2", "1 field, but 2 columns", "Quote"),
    ("csv quote open", "x.csv", b'prompt,answer\na,b\n"a,b\n', "line 3", "broken csv", "double the quotes"),
    ("csv column twice", "x.csv", b"prompt,prompt\na,b\n", "line 1", "occur twice: 'prompt'", "own name"),
    ("csv column unnamed", "x.csv", b"prompt,\na,b\n", "line 1", "no name", "Name every column"),
    ("no parquet", "x.parquet", b"PAR1 is not enough", "x.parquet", "not a readable parquet", "Fetch"),
    ("wrong columns", "x.csv", b"ask,reply\na,b\n", "line 2", "'ask', 'reply'", "prompt_column"),
    ("similar columns", "x.csv", b"question,reply\na,b\n", "line 2", "'question', 'reply'", "gsm8k (question, answer)"),
    (
        "a row lacks the column",
        "x.jsonl",
        lines(GOOD, {"text": "x"}),
        "line 2",
        "lacks the column 'prompt'",
        "every row",
    ),
    ("null prompt", "x.jsonl", lines(GOOD, {"prompt": None}), "line 2", "the prompt is null", "bad_rows: drop"),
    ("empty prompt", "x.csv", b'prompt,note\nok,1\n"",2\n', "line 3", "the prompt is empty", "bad_rows: drop"),
    ("blank prompt", "x.jsonl", lines({"prompt": " \n\t"}), "line 1", "the prompt is empty", "bad_rows: drop"),
    ("number as prompt", "x.jsonl", lines(GOOD, {"prompt": 5}), "line 2", "int, not text: 5", "bad_rows: drop"),
    ("list as prompt", "x.json", b'[{"prompt": "a"},\n{"prompt": ["b"]}]', "line 2", "a message is str", "bad_rows"),
    (
        "object as answer",
        "x.jsonl",
        lines({"prompt": "a", "answer": {"b": 1}}),
        "line 1",
        "the answer is dict",
        "bad_rows",
    ),
    ("half a surrogate", "x.jsonl", b'{"prompt": "\\ud800"}', "line 1", "surrogate", "bad_rows"),
    ("messages no list", "x.jsonl", lines({"messages": "hi"}), "line 1", "messages are str", "bad_rows"),
    ("messages empty", "x.jsonl", lines({"messages": []}), "line 1", "messages are empty", "bad_rows"),
    ("unknown role", "x.jsonl", lines({"messages": [{"role": "bot", "content": "x"}]}), "line 1", "'bot'", "bad_rows"),
    (
        "no user turn",
        "x.jsonl",
        lines({"messages": [{"role": "system", "content": "x"}]}),
        "line 1",
        "user turn",
        "bad_rows",
    ),
    (
        "content no text",
        "x.jsonl",
        lines({"messages": [{"role": "user", "content": 3}]}),
        "line 1",
        "and int",
        "bad_rows",
    ),
]


def check_message(error, *parts):
    text = str(error)
    for part in parts:
        assert part in text
    assert len(text) < SCREEN_CHARS
    assert text.count("\n") < SCREEN_LINES
    assert "How to mend it: " in text


@pytest.mark.parametrize(
    ("name", "file", "content", "where", "found", "cure"), BAD_FILES, ids=[b[0] for b in BAD_FILES]
)
def test_bad_file(tmp_path, tokenizer, name, file, content, where, found, cure):
    (tmp_path / file).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(lines({"prompt": "fine"}))
    data = AlignmentDataModule(str(tmp_path / file), str(tmp_path / "good.jsonl"), tokenizer=tokenizer)
    with pytest.raises(DataError) as caught:
        data.setup("fit")
    check_message(caught.value, str(tmp_path / file), where, found, cure)
    assert data.safety.rows is None, "nothing of a bad file is kept"


def test_the_matrix_is_large_enough():
    assert len(BAD_FILES) >= 30


def fails(**options):
    with pytest.raises(DataError) as caught:
        usable_rows(PromptSource(**options), "harmful")
    return caught.value


def test_missing_file_suggests_neighbours(tmp_path):
    (tmp_path / "harmful.csv").write_text("prompt\na\n")
    check_message(fails(path=str(tmp_path / "harmfull.csv")), "no such file", "Did you mean 'harmful.csv'")
    check_message(fails(path=str(tmp_path / "nowhere" / "x.csv")), "no such file", "is not there either")
    check_message(fails(path="x.jsonl"), "no such file")


def test_empty_folder(tmp_path):
    check_message(fails(path=str(tmp_path)), "no data file", ".jsonl")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jsonl").write_bytes(lines(GOOD))
    (tmp_path / "data" / "x.jsonl").symlink_to(tmp_path / "secret.jsonl")
    check_message(fails(path=str(tmp_path / "data")), "leads to", "outside the folder", "copy it")


def test_a_special_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    check_message(fails(path=str(tmp_path / "x.jsonl")), "neither a file nor a folder")


def test_truncated_and_mixed_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["a", None]}), path)
    check_message(fails(path=str(path)), "row 2", "the prompt is null", "bad_rows: drop")
    whole = path.read_bytes()
    path.write_bytes(whole[:-6] + struct.pack("<I", 2**31 - 1)[:2])
    check_message(fails(path=str(path)), "not a readable parquet", "Fetch")


def test_absurd_length(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(GOOD, {"prompt": "x" * (MAX_PROMPT_CHARS + 1)}))
    check_message(fails(path=str(path)), "line 2", "1,000,001 characters", "bad_rows: drop")
    from nspo_lightning.datamodules.sources import lines as text_lines

    monkeypatch.setattr(text_lines, "MAX_LINE_BYTES", 2**20)
    path.write_bytes(lines(GOOD) + b'{"prompt": "' + b"x" * 2**21 + b'"}')
    check_message(fails(path=str(path)), "line 2", "longer than 1 MiB")


def test_wrong_column_names(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("ask,reply\na,b\n")
    check_message(fails(path=str(path), prompt_column="aks"), "no column 'aks'", "'ask', 'reply'", "prompt_column")
    check_message(fails(path=str(path), prompt_column="ask", answer_column="r"), "no column 'r'", "answer_column")
    rows, _ = usable_rows(PromptSource(path=str(path), prompt_column="ask", answer_column="reply"), "harmful")
    assert (rows[0].prompt, rows[0].answer) == ("a", "b")


def test_a_preset_name_is_no_path():
    check_message(fails(path="gsm8k"), "name of a preset", "preset: gsm8k")


def test_unknown_part_of_a_built_in_world():
    check_message(fails(path="toy/harmless"), "no part 'harmless'", "'toy/harmful'")


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(GOOD, {"prompt": None}, {"prompt": ""}, {"prompt": " "}, {"prompt": 4}, {"prompt": "b"}))
    rows, report = usable_rows(PromptSource(path=str(path), bad_rows="drop"), "harmful")
    assert [row.prompt for row in rows] == ["Say a word", "b"]
    assert report.read == 6
    assert sum(report.dropped.values()) == 4
    assert report.dropped["bad (the prompt is empty)"] == 2


def test_dropping_bad_rows_does_not_excuse_a_broken_file(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines(GOOD) + b"{")
    check_message(fails(path=str(tmp_path / "x.jsonl"), bad_rows="drop"), "line 2", "not a JSON object")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs `path`, `preset` or `rows`"),
        ({"path": "x", "fraction": 0.0}, r"`fraction` must be in \(0, 1\], got 0.0"),
        ({"path": "x", "fraction": 40}, "Use 0.4 for 40 %"),
        ({"path": "x", "fraction": 0.4, "count": 3}, "both given"),
        ({"path": "x", "count": 0}, "`count` must be at least 1, got 0"),
        ({"path": "x", "max_prompt_tokens": 0}, "`max_prompt_tokens` must be at least 1"),
        ({"path": "x", "weight": 0.0}, "`weight` must be positive"),
        ({"path": "x", "streaming": True}, "`streaming` needs `count`"),
        ({"path": "x", "rows": list}, "`rows` and `path`"),
        ({"path": "x", "prompt_column": "a", "messages_column": "b"}, "both given"),
        ({"preset": "gsm8k", "prompt_column": "a"}, "`preset` .gsm8k. names the columns, not `prompt_column`"),
        ({"path": "x", "bad_rows": "ignore"}, "`bad_rows` must be one of"),
    ],
)
def test_contradicting_source_fields(options, message):
    with pytest.raises(ValueError, match=message):
        as_sources(PromptSource(**options), "safety")


STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_one_row_that_a_strict_template_refuses(tmp_path, bare_tokenizer, name):
    chats = [["user"], ["user", "assistant", "user"], ["user", "user"], ["assistant", "user"], ["user"]]
    rows = [{"messages": [{"role": role, "content": f"{i}"} for role in chat]} for i, chat in enumerate(chats)]
    text = lines(*rows) if name.endswith("l") else b"[" + lines(*rows).strip().replace(b"\n", b",\n") + b"]"
    (tmp_path / name).write_bytes(text)
    path, options = str(tmp_path / name), {"chat_template": STRICT, "tokenizer": bare_tokenizer}
    with pytest.raises(DataError) as caught:
        SafetyDataModule(path, **options).setup()
    check_message(caught.value, name, "line 3", "['user', 'user']", "roles must alternate", "bad_rows: drop")
    data = SafetyDataModule(PromptSource(path=path, bad_rows="drop"), val_size=0, test_size=0, **options)
    assert len(data.loaded().train[0]) == 3
    assert data.loaded().reports[0].dropped == {"bad (the chat template cannot render it)": 2}
    with pytest.raises(DataError) as caught:
        SafetyDataModule(PromptSource(path=path, bad_rows="drop"), system_prompt="Be kind.", **options).setup()
    check_message(caught.value, "none of its 5 rows is usable", "the chat template cannot render it")


def test_hub_without_network_is_one_message(monkeypatch):
    import datasets

    def no_network(**arguments):
        raise ConnectionError(f"Couldn't reach {arguments['path']!r} on the Hub" + " and again" * 500)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    check_message(fails(preset="gsm8k"), "openai/gsm8k", "ConnectionError", "point `path` at them")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_message(fails(path="some/dataset"), "some/dataset", "Offline mode")

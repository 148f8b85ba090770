"""Reading corpora: every format, every kind of location, and records that cannot be used."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import records
from data_prep.documents import read_documents
from data_prep.inputs import find_files, find_inputs
from data_prep.plan import make_plan
from data_prep.records import Bad, Fields, Part, Record, read_part, whole
from data_prep.spec import PrepSpec
from nextpt.base.errors import DataPrepError, InputWarning

TEXTS = [f"text {i} " + "é" * (i % 5) for i in range(50)]


def lines(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": str(i), "text": t}, ensure_ascii=False) + "\n"
        for i, t in enumerate(texts)
    ).encode()


FIELDS = Fields()


def read(path: Path, fields: Fields = FIELDS) -> list[Record | Bad]:
    return list(read_part(whole(find_files(path)[0]), fields))


def reasons(path: Path, fields: Fields = FIELDS) -> list[str]:
    return [r.reason if isinstance(r, Bad) else "good" for r in read(path, fields)]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst"]
)
def test_json_lines_plain_and_compressed(tmp_path: Path, name: str) -> None:
    data = lines(TEXTS)
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
    # Two members, as `cat a.gz b.gz` makes
    (tmp_path / name).write_bytes(pack(data[:700]) + pack(data[700:]))
    assert [(r.text, r.id) for r in read(tmp_path / name)] == [
        (t, str(i)) for i, t in enumerate(TEXTS)
    ]


def test_lines_of_all_kinds_of_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r\n\n  \n{"text": "b"}\n{"text": "c"}')
    assert [r.text for r in read(tmp_path / "a.jsonl")] == ["a", "b", "c"]
    assert [r.position for r in read(tmp_path / "a.jsonl")] == [0, 19, 33]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert read(tmp_path / "empty.jsonl") == []


@pytest.mark.parametrize("block", [7, 64, 2**22])
@pytest.mark.parametrize("size", [1, 3, 50, 200, 10**6])
def test_parts_of_a_file_hold_every_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, size: int
) -> None:
    monkeypatch.setattr(records, "BLOCK", block)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS[:12]))
    file = find_files(path)[0]
    parts = [
        Part(file, start, min(start + size, file.size), size) for start in range(0, file.size, size)
    ]
    got = [r for part in parts for r in read_part(part, Fields())]
    assert got == read(path) and len(got) == 12


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    table = pa.table({"id": list(range(50)), "text": TEXTS, "other": [1.0] * 50})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    file = find_files(tmp_path / "a.parquet")[0]
    got = [r for i in range(8) for r in read_part(Part(file, i, i + 1, 0), Fields())]
    assert [(r.text, r.id, r.position) for r in got] == [
        (t, str(i), i) for i, t in enumerate(TEXTS)
    ]
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(
            table.set_column(1, "text", pa.array(TEXTS).cast(kind)), tmp_path / "b.parquet"
        )
        assert [r.text for r in read(tmp_path / "b.parquet")] == TEXTS


def test_parquet_files_larger_than_a_unit_are_divided_by_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"id": list(range(50)), "text": TEXTS})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    pq.write_table(table, tmp_path / "b.parquet")
    monkeypatch.setattr("data_prep.plan.UNIT_BYTES", 700)
    plan = make_plan(
        PrepSpec(
            domains={"x": tmp_path}, output=tmp_path / "out", sequence_length=8, vocab_size=300
        )
    )
    parts = [(part.file.name, part.start, part.stop) for unit in plan.units for part in unit.parts]
    assert (
        parts == [("a.parquet", i, i + 1) for i in range(8)] + [("b.parquet", 0, 1)]
        and 2 < len(plan.units) < 9
    )
    assert (
        abs(
            plan.size - sum((tmp_path / name).stat().st_size for name in ("a.parquet", "b.parquet"))
        )
        < 16
    )


def test_null_and_non_utf8_parquet_rows_are_reported_one_by_one(tmp_path: Path) -> None:
    data = pa.array([b"fine", b"\xff\xfe", None, b"also"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, data.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert reasons(tmp_path / "a.parquet") == ["good", "not UTF-8", "null text", "good"]


@pytest.mark.parametrize(
    ("column", "message"),
    [(pa.array([1, 2]), "type int64"), (pa.array([b"a", b"b"]), "type binary")],
)
def test_a_parquet_file_whose_text_column_has_another_type_is_named(
    tmp_path: Path, column: pa.Array, message: str
) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataPrepError, match=f"a.parquet: column 'text' is of {message}"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataPrepError, match="no column 'body'; it has text"):
        read(tmp_path / "a.parquet", Fields("body"))


def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("zwei\n\u2028")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"eins"))
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "notes.md").write_text("no")
    assert [(d.id, d.text) for d in read_documents(tmp_path)] == [
        ("a.txt.gz", "eins"),
        ("b.txt", "zwei\n\u2028"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'{"body": "x"}', "no text"),
        (b'{"text": null}', "null text"),
        (b'{"text": 7}', "text is no string"),
        (b'{"text": ["x"]}', "text is no string"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not a JSON object"),
        (b'{"text": NaN}', "text is no string"),
    ],
)
def test_a_bad_line_is_reported_and_affects_no_other(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert reasons(tmp_path / "a.jsonl") == ["good", reason, "good"]
    assert read(tmp_path / "a.jsonl")[1].position == 14


def test_keys_are_chosen_and_dots_go_down(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"data": {"text": "a", "lang": "de"}, "n": 5}\n{"data.text": "b", "data": {"lang": "en"},'
        ' "n": 6}\n{"data": {"text": "c"}, "n": 7}\n'
    )
    got = read(tmp_path / "a.jsonl", Fields("data.text", "n", "data.lang"))
    assert [(r.text, r.id, r.domain) for r in got[:2]] == [("a", "5", "de"), ("b", "6", "en")]
    assert got[2].reason == "no domain" and got[2].id == "7"


def test_a_line_without_end_is_skipped_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 1000)
    monkeypatch.setattr(records, "BLOCK", 300)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * 50_000 + b'"}\n{"text": "b"}\n')
    assert reasons(path) == ["good", "line too long", "good"]
    assert read(path)[2].position == path.read_bytes().index(b'{"text": "b"}')
    path.write_bytes(b"x" * 5000)
    assert reasons(path) == ["line too long"]


def test_a_text_file_that_is_too_long_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST_DOCUMENT", 100)
    (tmp_path / "a.txt").write_bytes(b"x" * 101)
    (tmp_path / "b.txt").write_bytes(b"x" * 100)
    assert [reasons(tmp_path / name) for name in ("a.txt", "b.txt")] == [
        ["document too long"],
        ["good"],
    ]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    data = np.random.default_rng(0).bytes(20_000).hex().encode()
    whole_file = {"gz": gzip.compress, "zst": zstandard.compress}[name.rpartition(".")[2]](
        b'{"text": "' + data + b'"}\n'
    )
    (tmp_path / name).write_bytes(whole_file[: len(whole_file) // 2])
    with pytest.raises(DataPrepError, match=f"{name} cannot be read: .*[Tt]runcated"):
        read(tmp_path / name)


def test_a_file_that_is_not_compressed_is_named(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"hello, this is plain text")
        with pytest.raises(DataPrepError, match=name):
            read(tmp_path / name)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "BOMB_FLOOR", 2**22)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"\0" * 2**25))
    with pytest.raises(DataPrepError, match="bomb"):
        read(tmp_path / "a.jsonl.zst")


def test_globs_folders_and_empty_locations(tmp_path: Path) -> None:
    for name in ("x/a.jsonl", "x/y/b.jsonl", "x/y/c.txt", "z/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "t"}\n')

    def matching(pattern: str) -> list[str]:
        return [f.uri.removeprefix(f"{tmp_path}/") for f in find_files(f"{tmp_path}/{pattern}")]

    assert matching("x") == ["x/a.jsonl", "x/y/b.jsonl", "x/y/c.txt"]
    assert matching("x/*.jsonl") == ["x/a.jsonl"] and matching("x/**/*.jsonl") == [
        "x/a.jsonl",
        "x/y/b.jsonl",
    ]
    assert matching("*/?.jsonl") == ["x/a.jsonl", "z/d.jsonl"] and matching("[xz]/[a-c].jsonl") == [
        "x/a.jsonl"
    ]
    for glob, message in (
        ("x/*.gz", "no file matches"),
        ("nowhere", "does not exist"),
        ("x/y/../y/e.csv", "does not exist"),
    ):
        with pytest.raises(DataPrepError, match=message):
            find_files(f"{tmp_path}/{glob}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataPrepError, match="holds no file that is read"):
        find_files(tmp_path / "empty")


def names(location: Path | str) -> list[str]:
    return [file.name for file in find_files(location)]


def test_links_in_a_folder_are_followed_and_each_file_is_read_once(tmp_path: Path) -> None:
    for name in ("x/a.jsonl", "x/y/b.jsonl", "z/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "t"}\n')
    (tmp_path / "x" / "latest").symlink_to(".")
    (tmp_path / "x" / "above").symlink_to(tmp_path)
    (tmp_path / "x" / "0.jsonl").symlink_to("a.jsonl")
    (tmp_path / "x" / "hard.jsonl").hardlink_to(tmp_path / "x" / "a.jsonl")
    with pytest.warns(InputWarning, match=r"x: \d+ links and second names.*read once"):
        assert names(tmp_path / "x") == ["a.jsonl", "above/z/c.jsonl", "y/b.jsonl"]
    with pytest.warns(InputWarning):
        assert names(f"{tmp_path}/x/**/*.jsonl") == ["a.jsonl", "above/z/c.jsonl", "y/b.jsonl"]
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "z").symlink_to(tmp_path / "z")  # nothing else leads there
    assert names(tmp_path / "w") == ["z/c.jsonl"]


def test_links_to_nothing_are_errors_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "t"}\n')
    (tmp_path / "part").symlink_to("/nowhere")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "_marker").symlink_to("/nowhere")
    for location, name in ((tmp_path, "loop.jsonl"), (tmp_path / "part", "part")):
        with pytest.raises(DataPrepError, match=f"{name} is a link to"):
            find_files(location)
    (tmp_path / "loop.jsonl").unlink()
    with pytest.raises(DataPrepError, match="part is a link to /nowhere"):
        find_files(tmp_path)
    (tmp_path / "part").unlink()
    assert names(tmp_path) == ["a.jsonl"]


def test_pipes_are_errors_by_name(tmp_path: Path) -> None:
    """Such as the /dev/fd/63 of a shell's <(...)."""
    os.mkfifo(tmp_path / "b.jsonl")
    for location in (tmp_path / "b.jsonl", tmp_path):
        with pytest.raises(DataPrepError, match=r"b\.jsonl is a pipe or a device; expected a file"):
            find_files(location)


def test_a_file_of_two_inputs_is_read_for_the_one_that_holds_it(tmp_path: Path) -> None:
    for name in ("x/a.jsonl", "y/b.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text('{"text": "t"}\n')
    (tmp_path / "x" / "other").symlink_to(tmp_path / "y")
    with pytest.warns(InputWarning, match=r"1 files of p are files of q too, such as .*b\.jsonl"):
        inputs = find_inputs({"p": tmp_path / "x", "q": tmp_path / "y"})
    assert {key: [f.name for f in files] for key, files in inputs.items()} == {
        "p": ["a.jsonl"],
        "q": ["b.jsonl"],
    }
    with (
        pytest.warns(InputWarning),
        pytest.raises(DataPrepError, match=r"\(q\) holds only files of the other inputs"),
    ):
        find_inputs({"p": tmp_path / "x", "q": tmp_path / "x" / "a.jsonl"})


def test_what_exists_is_no_pattern(tmp_path: Path) -> None:
    for name in ("data[1]/a.jsonl", "data1/b.jsonl", "c[ab].jsonl", "ca.jsonl", "what?.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "t"}\n')
    assert names(f"{tmp_path}/data[1]") == ["a.jsonl"]
    assert names(f"{tmp_path}/data[1]/*.jsonl") == ["a.jsonl"]
    assert names(f"{tmp_path}/data[12]/*.jsonl") == ["data1/b.jsonl"]
    assert names(f"{tmp_path}/c[ab].jsonl") == ["c[ab].jsonl"]
    assert names(f"{tmp_path}/c[abc].jsonl") == ["ca.jsonl"]
    assert names(f"{tmp_path}/what?.txt") == ["what?.txt"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_byte_order_marks_are_skipped(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    end = {gzip.compress: ".gz", zstandard.compress: ".zst"}.get(pack, "")
    mark = b"\xef\xbb\xbf"
    line = b'{"text": "a"}\n'
    (tmp_path / f"a.jsonl{end}").write_bytes(pack(mark + line + mark + line + mark))
    (tmp_path / f"a.txt{end}").write_bytes(pack(mark + b"a"))
    for name in ("a.jsonl", "a.txt"):
        assert {r.text for r in read(tmp_path / f"{name}{end}")} == {"a"}


def test_nan_and_infinity_are_read_as_python_writes_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"score": NaN, "text": "a"}\n{"text": "b", "x": [Infinity, -Infinity]}\n{"text": NaN}\n'
        '{"text": "NaN"\n'
    )
    assert reasons(tmp_path / "a.jsonl") == [
        "good",
        "good",
        "text is no string",
        "not a JSON object",
    ]


def test_large_and_empty_ids(tmp_path: Path) -> None:
    ids = ["18446744073709551617", "18446744073709551618", "1.5", "7", '""', "null"]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"id": {i}, "text": "a"}}\n' for i in ids))
    assert [r.id for r in read(tmp_path / "a.jsonl")] == [*ids[:4], None, None]


def test_a_missing_key_is_named_with_those_that_exist(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "1", "content": "a"}\n')
    (bad,) = read(tmp_path / "a.jsonl")
    assert isinstance(bad, Bad) and bad.detail.endswith("its keys are 'id', 'content'")
    assert reasons(tmp_path / "a.jsonl", Fields("content", "uuid")) == ["no id"]
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataPrepError, match="no column 'uuid'; it has text"):
        read(tmp_path / "a.parquet", Fields("text", "uuid"))


def test_what_is_no_json_lines_is_refused_by_name(tmp_path: Path) -> None:
    for number, (content, message) in enumerate(
        [
            ('[\n  {"text": "a"}\n]\n', r"one JSON array.*jq -c '\.\[\]'"),
            ('[{"text": "a"}]', "one JSON array"),
            ('{\n  "text": "a"\n}\n', "indented JSON"),
            ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ]
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        with pytest.raises(DataPrepError, match=f"{number}.json is .*{message}"):
            read(path)
    (tmp_path / "a.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DataPrepError, match="git lfs pull"):
        read(tmp_path / "a.txt")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataPrepError, match="several columns are named 'text'"):
        read(tmp_path / "a.parquet")


def test_folders_of_partitions_give_the_domain(tmp_path: Path) -> None:
    folder = tmp_path / "lang=c%2B%2B"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"]}), folder / "a.parquet")
    (folder / "a.jsonl").write_text('{"text": "a"}\n{"text": "a", "lang": "c"}\n')
    fields = Fields("text", None, "lang")
    assert [r.domain for r in read(folder / "a.parquet", fields)] == ["c++"]
    assert [r.domain for r in read(folder / "a.jsonl", fields)] == ["c++", "c"]


@pytest.mark.parametrize("log", [27, 28, 31])
def test_long_windows_of_zstd(tmp_path: Path, log: int) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = stream.compress(lines(TEXTS)) + stream.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    if log == 27:
        assert len(read(tmp_path / "a.jsonl.zst")) == len(TEXTS)
    else:
        with pytest.raises(DataPrepError, match=r"a\.jsonl\.zst was compressed with a long window"):
            read(tmp_path / "a.jsonl.zst")


def test_zeros_after_a_gzip_stream(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)) + bytes(512))
    with pytest.raises(DataPrepError, match=r"a\.jsonl\.gz has other bytes after its gzip stream"):
        read(tmp_path / "a.jsonl.gz")


def test_a_text_file_of_any_size_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "BLOCK", 1000)
    monkeypatch.setattr(records, "LONGEST_LINE", 100)
    (tmp_path / "a.txt").write_text("word " * 10_000)
    (record,) = read(tmp_path / "a.txt")
    assert isinstance(record, Record) and len(record.text) == 50_000
    assert records.LONGEST_DOCUMENT == 2**32 - 1


def test_small_files_are_known_by_content_and_large_ones_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    before = find_files(path)
    path.write_bytes(lines(TEXTS))
    assert find_files(path) == before
    path.write_bytes(lines(TEXTS[::-1]))
    assert find_files(path)[0].size == before[0].size and find_files(path) != before
    monkeypatch.setattr("data_prep.inputs.SMALL", 10)
    assert find_files(path)[0].stamp == path.stat().st_mtime_ns

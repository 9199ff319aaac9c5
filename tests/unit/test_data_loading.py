"""Files of every kind give the same rows, and every mistake a sentence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_ray.config.schema import DatasetSection
from rlhf_ray.data.files import Row
from rlhf_ray.data.loading import first_rows, load_rows
from rlhf_ray.errors import DataError

ROWS: list[Row] = [
    {"prompt": "What, again?", "topic": "a"},
    {"prompt": 'He said "no".\nTwice.', "topic": "b"},
    {"prompt": "Größe → 水", "topic": "c"},
]


def write(path: Path, rows: list[Row]) -> Path:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "jsonl":
        content = "\n\n".join(json.dumps(row) for row in rows).encode()
    elif kind == "json":
        content = json.dumps(rows, indent=1, ensure_ascii=False).encode()
    elif kind == "csv":
        quoted = [[str(value).replace('"', '""') for value in row.values()] for row in rows]
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row) for row in quoted)]
        content = "\r\n".join(lines).encode("utf-8-sig")
    else:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        content = sink.getvalue().to_pybytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def section(path: Path | str, **keys: object) -> DatasetSection:
    return DatasetSection.model_validate({"path": str(path), **keys})


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_kinds_of_files_give_equal_rows(tmp_path: Path, kind: str, compressed: str) -> None:
    table = load_rows(section(write(tmp_path / f"rows.{kind}{compressed}", ROWS)), seed=0)
    assert table.rows == ROWS
    assert table.positions == [0, 1, 2]
    assert table.columns == ["prompt", "topic"]
    reference = load_rows(section(write(tmp_path / "reference.jsonl", ROWS)), seed=0)
    assert table.fingerprint == reference.fingerprint


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = load_rows(section(write(tmp_path / "a.jsonl", ROWS)), seed=0).fingerprint
    changed: list[Row] = [*ROWS[:2], {"prompt": "Größe → 水!", "topic": "c"}]
    assert load_rows(section(write(tmp_path / "b.jsonl", changed)), seed=0).fingerprint != first
    assert load_rows(section(write(tmp_path / "c.jsonl", ROWS[::-1])), seed=0).fingerprint != first


def test_limit_takes_the_first_rows_of_a_seeded_shuffle(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"Question {row}"} for row in range(100)])
    ten, five = (load_rows(section(path, limit=limit), seed=7) for limit in (10, 5))
    assert ten.positions[:5] == five.positions
    assert [row["prompt"] for row in ten.rows] == [f"Question {position}" for position in ten.positions]
    assert len(set(ten.positions)) == 10
    assert ten.positions != sorted(ten.positions)
    assert load_rows(section(path, limit=10), seed=8).positions != ten.positions
    assert len(load_rows(section(path, limit=1000), seed=7)) == 100
    assert ten.fingerprint == load_rows(section(path), seed=0).fingerprint


def test_the_embedded_datasets_have_disjoint_splits() -> None:
    for name, column in (("prompts", "prompt"), ("demonstrations", "messages")):
        train = load_rows(section(f"embedded:{name}"), seed=0)
        test = load_rows(section(f"embedded:{name}", split="test"), seed=0)
        assert len(train) > len(test) > 0
        assert "split" not in train.columns
        seen = [json.dumps(row[column]) for row in [*train.rows, *test.rows]]
        assert len(set(seen)) == len(seen)
        assert train.fingerprint != test.fingerprint


def test_a_folder_and_a_saved_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    write(folder / "test.jsonl", ROWS[:1])
    assert load_rows(section(folder), seed=0).rows == ROWS
    assert load_rows(section(folder, split="test"), seed=0).rows == ROWS[:1]
    with pytest.raises(DataError, match="split=nope"):
        load_rows(section(folder, split="nope"), seed=0)
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(saved)
    assert load_rows(section(saved), seed=0).rows == ROWS
    with pytest.raises(DataError, match=r"split=test.*has the splits train"):
        load_rows(section(saved, split="test"), seed=0)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a local file or folder with data"):
        load_rows(section(tmp_path), seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n\n{"prompt": \n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"prompt": "x"}\n[1, 2]\n', r"line 2: not a table: .*found list"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}\n', r"line 2: not UTF-8"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, r"line 1: not (valid|usable) JSON"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", r"line 1: not usable JSON"),
        ("a.jsonl", b"\n \n", r"has no rows"),
        ("a.json", b'{"prompt": ["x", "y"]}', r"not a table: .*called \.jsonl"),
        ("a.json", b'[{"prompt": "x"},\n "y"]', r"row 2: not a table"),
        ("a.json", b'[\n{"prompt": "x",}]', r"not valid JSON, line 2"),
        ("a.csv", b'prompt,topic\nx,a\n"y",b,c\n', r"line 3: 3 values for 2 columns"),
        ("a.csv", b'prompt\nx\n"y" z\n', r"line 3: not valid CSV"),
        ("a.csv", b"prompt,prompt\nx,y\n", r"column names must differ"),
        ("a.csv", b"prompt\nx\n\xff\n", r"not UTF-8"),
        ("a.csv", b"prompt\n", r"has no rows"),
        ("a.parquet", b"PAR1 not at all", r"not a readable Parquet file"),
        ("a.jsonl.gz", b'{"prompt": "x"}\n', r"not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 999, mtime=0)[:-20], r"not a whole gzip file"),
        ("a.txt", b"hello", r"unknown kind of file; use one of \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(section(tmp_path / name), seed=0)
    assert name in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "prompts.jsonl", ROWS)
    message = r"dataset\.path=.*promts\.jsonl: no such file; did you mean .*/prompts\.jsonl"
    with pytest.raises(DataError, match=message):
        load_rows(section(tmp_path / "promts.jsonl"), seed=0)
    with pytest.raises(DataError, match=r"no folder .*/nowhere"):
        load_rows(section(tmp_path / "nowhere" / "prompts.jsonl"), seed=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "embedded:promts"}, "no such embedded dataset; use embedded:prompts"),
        ({"path": "embedded:prompts", "split": "dev"}, "split=dev: .* has the splits test and train"),
        ({"path": "embedded:prompts", "name": "x"}, "name=x: only hub datasets"),
        ({"path": ""}, "not a path"),
        ({"path": "a\0b"}, "not a path"),
        ({"path": "~nobody-of-this-name/rows.jsonl"}, "write the path in full"),
        ({"path": "/" + "x" * 5000}, "cannot be read"),
        ({"path": "./nowhere"}, "no such file"),
    ],
)
def test_a_wrong_section_is_refused(keys: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(DatasetSection.model_validate(keys), seed=0)


def test_a_local_file_has_one_split_and_no_configuration(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match=r"split=test: the file .* is one split, 'train'"):
        load_rows(section(path, split="test"), seed=0)
    with pytest.raises(DataError, match="name=en"):
        load_rows(section(path, name="en"), seed=0)


def test_first_rows_reads_no_further_than_it_must(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n' * 5 + b"damaged\n")
    assert first_rows(section(path), 5) == [{"prompt": "x"}] * 5
    with pytest.raises(DataError, match="line 6"):
        first_rows(section(path), 6)


def test_a_hub_name_is_not_asked_when_only_checking() -> None:
    assert first_rows(section("somebody/something"), 5) is None

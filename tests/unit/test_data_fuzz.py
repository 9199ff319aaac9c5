"""Whatever a file holds, it gives examples or a `DataError`, no other exception, and no row is lost."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.config.schema import DatasetSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.encoding import encode_pairs, encode_prompts, encode_sft
from rlhf_ray.data.formats import (
    Purpose,
    check_columns,
    labelled_examples,
    preference_examples,
    prompt_examples,
    sft_examples,
)
from rlhf_ray.data.loading import Table, load_rows
from rlhf_ray.data.unpaired import encode_labelled
from rlhf_ray.errors import DataError
from tests.tiny import tiny_tokenizer

FORMATTER = ChatFormatter(tiny_tokenizer(), [2])

text = st.one_of(
    st.text(st.characters(), max_size=12),
    st.sampled_from(
        [
            "\n\nHuman: a\n\nAssistant: b",
            "\n\nHuman: a\n\nAssistant:",
            "\n\nHuman: a\n\nAssistant: c",
            "\n\nHuman:",
            "<|im_end|>",
            "1e400",
            "true",
        ]
    ),
)
roles = st.sampled_from(["system", "user", "assistant"])
role = st.one_of(roles, st.none(), text, st.lists(st.none(), max_size=1))
turn = st.one_of(
    st.fixed_dictionaries({"role": role, "content": st.one_of(text, st.none(), st.integers())}),
    st.dictionaries(text, text, max_size=2),
    text,
)
good_pair = st.tuples(text, text).map(
    lambda both: [{"role": "user", "content": both[0]}, {"role": "assistant", "content": both[1]}]
)
value = st.one_of(
    text,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.lists(turn, max_size=4),
    good_pair,
    good_pair,
)
NAMES = ["messages", "text", "prompt", "completion", "chosen", "rejected", "label"]
NAMES += ["margin", "soft_label", "other"]
row = st.dictionaries(st.sampled_from(NAMES), value, max_size=6)


@settings(max_examples=250, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=4), max_length=st.integers(1, 60))
def test_any_rows_give_examples_or_a_data_error(rows: list[dict[str, object]], max_length: int) -> None:
    table = Table(rows, list(range(len(rows))), "rows", "0")
    try:
        sft, skipped = sft_examples(table)
        assert len(sft) + len(skipped) == len(rows)
        sft_batch, cut = encode_sft(sft, FORMATTER, max_length)
        assert len(sft_batch) + len(cut) == len(sft)
        assert all(target.any() for target in sft_batch.is_target)
    except DataError:
        pass
    try:
        prompts, skipped = prompt_examples(table)
        assert len(prompts) + len(skipped) == len(rows)
        prompt_batch, cut = encode_prompts(prompts, FORMATTER, max_length)
        assert prompt_batch.token_ids.lengths.max() <= max_length
    except DataError:
        pass
    try:
        pairs, skipped = preference_examples(table)
        assert len(pairs) + len(skipped) == len(rows)
        pair_batch, cut = encode_pairs(pairs, FORMATTER, max_length)
        assert (pair_batch.chosen.lengths > pair_batch.prompt_lengths).all()
        assert ((pair_batch.soft_label >= 0.5) & (pair_batch.soft_label <= 1)).all()
    except DataError:
        pass
    try:
        answers, skipped = labelled_examples(table)
        assert len(answers) + len(skipped) == len(rows)
        answer_batch, cut = encode_labelled(answers, FORMATTER, max_length)
        assert (answer_batch.mismatched.lengths > answer_batch.prompt_lengths).all()
        assert answer_batch.mismatched.lengths.max() <= max_length
    except DataError:
        pass


line = st.one_of(row.map(lambda content: json.dumps(content).encode()), st.binary(max_size=30))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(line, max_size=4),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "a.tsv"]),
    compressed=st.booleans(),
    purpose=st.sampled_from(["sft", "prompts", "pairs", "labelled answers"]),
)
def test_any_file_gives_rows_or_a_data_error(
    lines: list[bytes], name: str, compressed: bool, purpose: Purpose
) -> None:
    content = b"\n".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(gzip.compress(content) if compressed else content)
        section = DatasetSection(path=str(path))
        assert len(check_columns(section, purpose)) <= 1
        try:
            table = load_rows(section, seed=0)
        except DataError as error:
            assert name in str(error)
        else:
            assert len(table) > 0


@pytest.mark.parametrize("cut", range(0, 400, 23))
def test_a_parquet_file_that_is_cut_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["Why?", "Who?"]}), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"rows\.parquet"):
        load_rows(DatasetSection(path=str(path)), seed=0)

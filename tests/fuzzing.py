"""Bad configurations and datasets in great number, for `rlhf-ray check`."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st

from tests.tiny import tiny_model_folder

CONFIGS = Path(__file__).parents[1] / "configs"
Tree = dict[str, object]
KeyPath = tuple[str | int, ...]


def make_place(folder: Path) -> None:
    """What configurations of this module name, in the folder in which they are checked."""
    tiny_model_folder(folder / "tiny")
    rows = [{"prompt": f"How do I boil {number} eggs?"} for number in range(3)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@cache
def packaged() -> list[Tree]:
    """The packaged configurations, with a model that is read in no time."""
    trees = [cast(Tree, yaml.safe_load(path.read_text())) for path in sorted(CONFIGS.glob("*.yaml"))]
    return [{**tree, "model": {**cast(Tree, tree.get("model", {})), "path": "tiny"}} for tree in trees]


# Configurations as trees

ODD_TEXTS = [
    *("", " ", ".", "..", "/", "~", "~nobody/x", "//", "a/b/c", "hub/name", "nul\0l", "\ud800", "x" * 300),
    *("embedded:", "embedded:x", "embedded:prompts", "embedded:smollm2-135m-instruct", "é" * 130, "😀"),
    *("reasoning_gym:", "reasoning_gym:chain_sum", "reasoning_gym:x", "\u202e\u2066", "\x1b[2J"),
    *("json:loads", "os:nothing", ":", "a.b:c.d", "tests.fakes:raises", "tests.fakes:PowerCut", "..x:y"),
    *("prompts.jsonl", "prompts.jsonl/x", "tiny", "tiny/config.json", "/dev/zero", "/proc/self/mem"),
    *("http://[", "http://a:b@c", "http://h:99999999/", "3h", "2030-01-31T18:30", "9" * 5000 + "d"),
    *("[", "(?P<", "(a+)+$", "{0}{x}", "{{", "%s", "1e5", "null", "auto", "true", "never", "max"),
]
ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.5, 1e-30, 1e30, 10**12, 10**30, 10**400, -(2**63)),
    *(float("nan"), float("inf"), [], [[]], {}, [None], [{}], {"": {}}, {"type": "model"}, [1, "a", None]),
    *({"path": {}}, {"path": "prompts.jsonl"}, ["q_proj"], {"a": {"b": {"c": [[[0]]]}}}),
]
NESTED = st.recursive(
    st.none() | st.text(max_size=4) | st.integers(-3, 3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
JUNK = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.sampled_from(ODD_VALUES),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
    NESTED,
).map(copy.deepcopy)
COMMON_KEYS = ["model", "path", "type", "dataset", "name", "options", "limit", "environment", "checkpoint"]
KEYS = st.text(max_size=6) | st.sampled_from(COMMON_KEYS)


def places(tree: object, path: KeyPath = ()) -> list[KeyPath]:
    """Of every value in a tree, the tree first."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def at(tree: object, path: KeyPath) -> object:
    for piece in path:
        tree = cast(dict[str | int, object], tree)[piece]
    return tree


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """A packaged configuration with up to four things wrong."""
    tree = copy.deepcopy(draw(st.sampled_from(packaged())))
    for _ in range(draw(st.integers(1, 4))):
        if len(places(tree)) > 1:
            change(draw, tree)
    return tree


def change(draw: st.DrawFn, tree: Tree) -> None:
    path = draw(st.sampled_from(places(tree)[1:]))
    parent, key = cast(dict[str | int, object], at(tree, path[:-1])), path[-1]
    kind = draw(st.sampled_from(["value", "value", "value", "remove", "wrap", "key", "swap"]))
    if kind == "remove":
        del parent[key]
    elif kind == "wrap":
        parent[key] = draw(st.sampled_from([[parent[key]], {"x": parent[key]}]))
    elif kind == "swap":
        parent[key] = copy.deepcopy(at(tree, draw(st.sampled_from(places(tree)))))
    elif kind == "key" and isinstance(parent, dict):
        parent[draw(KEYS)] = draw(JUNK)
    else:
        parent[key] = draw(JUNK)


# Configurations as files


def bomb(levels: int) -> str:
    """Ten aliases of ten aliases …"""
    rows = ["a0: &a0 [x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(rows)


ODD_FILES = [
    *(
        b"",
        b"\0",
        b"\xff\xfe\x00",
        b"\xef\xbb\xbf",
        b"\x80\x81",
        b"---",
        b"--- ---",
        b"...",
        b"%YAML 9.9\n---",
    ),
    *(b"a: 1\n---\nb: 2\n", b"- 1\n", b"text", b"null", b"&a *a", b"a: &a [*a]", b"<<: *x", b"? [1]\n: 2"),
    *(b"!!python/object/apply:os.system ['true']", b"a: !!python/name:os.system", b"a: !x y", b"a: <<"),
    *(b"\ta: b", b"a:\n\t- b", b"'", b'"\\ud800"', b'"\\x"', b"{" * 5000, b"[" * 5000, b"a: " * 3000),
    *(b"a: !!binary '='", b"- " * 3000),
    *(bomb(3).encode(), bomb(9).encode(), bomb(40).encode(), b"x" * 2_000_000, b"a: " + b"9" * 6000),
    *(bytes(range(256)), b"PK\x03\x04" + bytes(100), gzip.compress(b"sft: {}"), b"output_dir: 2030-01-31\n"),
]


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """A packaged configuration's file with something wrong in its text, or something else altogether."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(ODD_FILES) | st.binary(max_size=60))
    text = draw(st.sampled_from([yaml.safe_dump(tree, sort_keys=False).encode() for tree in packaged()]))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 5, 40])))
        put = draw(
            st.sampled_from([b"", b"\n", b"\t", b": ", b"- ", b"&a ", b"*a", b"'", b'"', b"{", b"#", b"\0"])
            | st.sampled_from(ODD_FILES[:30])
            | st.binary(max_size=4)
        )
        text = text[:start] + put + text[end:]
    return text


# Datasets

PURPOSES: dict[str, Tree] = {
    "sft": {"sft": {}},
    "preference": {"preference": {"algorithm": "dpo"}},
    "kto": {"preference": {"algorithm": "kto"}},
    "online": {
        "online": {
            "num_steps": 1,
            "prompts_per_step": 2,
            "critic_init": "policy",
            "rewards": [{"type": "exact_match", "name": "right"}, {"type": "length", "max_length": 9}],
        }
    },
    "preferences": {"preferences": {}},
    "people": {"preferences": {"annotators": [{"type": "file"}]}},
    "reward": {"reward": {}},
    "constitution": {"constitution": {}},
}
COLUMNS = ["messages", "text", "prompt", "completion", "chosen", "rejected", "label", "margin", "soft_label"]
TEXT = st.text(max_size=8) | st.sampled_from(
    ["\n\nHuman: a\n\nAssistant: b", "\n\nHuman:", "<|im_end|>", "1e400", "true", "\ud800", "\0", "é", ""]
)
TURN = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "x", None]), "content": TEXT | st.none()}
    ),
    st.dictionaries(TEXT, TEXT, max_size=2),
    TEXT,
)
CELL = st.one_of(
    TEXT,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.lists(TURN, max_size=3),
    st.just([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    NESTED,
)
ROW = st.dictionaries(st.sampled_from([*COLUMNS, "answer", "", "other"]), CELL, max_size=6)
ENDINGS = [
    "jsonl",
    "json",
    "csv",
    "parquet",
    "jsonl.gz",
    "csv.gz",
    "parquet.gz",
    "JSONL",
    "tsv",
    "txt",
    "gz",
    "bin",
]


@dataclass(frozen=True)
class BadData:
    """Fields: content: of the file; None makes it a folder."""

    purpose: str
    name: str
    content: bytes | None
    limit: int | None


def as_csv(rows: list[Tree]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(names)
    writer.writerows([[row.get(name, "") for name in names] for row in rows])
    return out.getvalue().encode("utf-8", "replace")


def as_parquet(rows: list[Tree]) -> bytes:
    """What Arrow can make of the rows; else as texts."""
    out = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), out)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):
        out = io.BytesIO()
        pq.write_table(pa.table({"prompt": [ascii(row) for row in rows]}), out)
    return out.getvalue()


def as_bytes(rows: list[Tree], ending: str) -> bytes:
    kind = ending.lower().removesuffix(".gz")
    if kind == "csv":
        plain = as_csv(rows)
    elif kind == "parquet":
        plain = as_parquet(rows)
    elif kind == "json":
        plain = json.dumps(rows).encode()
    else:
        plain = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    return gzip.compress(plain) if ending.endswith("gz") else plain


@st.composite
def datasets(draw: st.DrawFn) -> BadData:
    """Rows that make no sense, in a file that is perhaps damaged, or is no file."""
    ending = draw(st.sampled_from(ENDINGS))
    content = as_bytes(draw(st.lists(ROW, max_size=4)), ending)
    damage = draw(st.sampled_from(["none", "none", "cut", "insert", "other", "folder"]))
    if damage == "cut":
        content = content[: draw(st.integers(0, len(content)))]
    elif damage == "insert":
        place = draw(st.integers(0, len(content)))
        odd = [
            b'"',
            b",",
            b"\n",
            b"\r",
            b"\0",
            b"\xff",
            b"\xef\xbb\xbf",
            b"\xff\xfe",
            b"[" * 5000,
            b"9" * 5000,
        ]
        content = content[:place] + draw(st.sampled_from(odd) | st.binary(max_size=5)) + content[place:]
    elif damage == "other":
        content = as_bytes(draw(st.lists(ROW, max_size=2)), draw(st.sampled_from(ENDINGS)))
    is_folder = damage == "folder" and draw(st.integers(0, 9)) == 0  # the library that reads them takes long
    limit = draw(st.none() | st.sampled_from([1, 3, 10**9]))
    purpose = draw(st.sampled_from(sorted(PURPOSES)))
    return BadData(purpose, f"data.{ending}", None if is_folder else content, limit)


# What is checked

Case = Tree | bytes | BadData


def prepared(case: Case) -> list[str]:
    """Write it here; the words of the command line that looks at it."""
    path = Path("fuzz.yaml")
    if isinstance(case, BadData):
        path.write_text(json.dumps(_configuration(case)))
    elif isinstance(case, bytes):
        path.write_bytes(case)
    else:
        path.write_text(json.dumps(case, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    return ["check", str(path)]


def _configuration(data: BadData) -> Tree:
    folder = Path("data")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / data.name
    if data.content is None:
        path.mkdir()
        (path / "x.jsonl").write_bytes(b'{"prompt": 1}\n{"prompt": "a"}\n')
    else:
        path.write_bytes(data.content)
    dataset = {"path": str(path), "limit": data.limit}
    ((stage, section),) = copy.deepcopy(PURPOSES[data.purpose]).items()
    assert isinstance(section, dict)
    if data.purpose == "people":
        section["annotators"][0]["dataset"] = dataset
    else:
        section["dataset"] = dataset
    return {"output_dir": "runs/fuzz", "model": {"path": "tiny"}, stage: section}

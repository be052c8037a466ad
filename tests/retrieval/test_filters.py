"""A filtered search is a search of the subset: exactly, over any shards, in every structure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bixse.records import Hit, Kind, Metadata
from bixse.retrieval import filters, metadata
from bixse.retrieval.building import build_shard
from bixse.retrieval.filters import (
    MOST_CONDITIONS,
    MOST_VALUES,
    Condition,
    Filter,
    FilterError,
    bounded,
    check,
)
from bixse.retrieval.finder import Finder
from bixse.retrieval.lexical import LexicalIndex
from bixse.retrieval.lexical_shard import LexicalShard, Statistics, build_lexical
from bixse.retrieval.merge import merge, ranked
from bixse.retrieval.metadata import Fields, Kept, write_metadata
from bixse.retrieval.settings import Lexical, Retrieval
from bixse.retrieval.shard import Shard
from tests.retrieval.made import clustered, table

KINDS: dict[str, Kind] = {"brand": "text", "new": "boolean", "price": "number", "tags": "texts"}
BRANDS, TAGS = ["acme", "apex", "Zürich", "", "水"], ["red", "green", "blue"]


def meets(document: Metadata, said: dict[str, Any]) -> bool:
    """The grammar once more, of one document in Python."""
    for field, condition in said.items():
        if field == "not":
            if meets(document, condition):
                return False
        elif field == "or":
            if not any(meets(document, one) for one in condition):
                return False
        elif not all(
            holds(document.get(field), operator, value)
            for operator, value in (
                condition.items() if isinstance(condition, dict) else [("eq", condition)]
            )
        ):
            return False
    return True


def holds(has: Any, operator: str, value: Any) -> bool:
    if operator == "exists":
        return (has is not None) == value
    if has is None:
        return False
    return {
        "eq": lambda: has == value,
        "in": lambda: has in value,
        "gte": lambda: has >= value,
        "gt": lambda: has > value,
        "lte": lambda: has <= value,
        "lt": lambda: has < value,
        "any": lambda: bool(set(has) & set(value)),
        "all": lambda: set(value) <= set(has),
    }[operator]()


NUMBERS = st.integers(-3, 3) | st.sampled_from([0.5, -1.5])
DOCUMENT = st.fixed_dictionaries(
    {},
    optional={
        "brand": st.sampled_from(BRANDS),
        "price": NUMBERS,
        "new": st.booleans(),
        "tags": st.lists(st.sampled_from(TAGS), max_size=3),
    },
)
RANGES = ("gte", "gt", "lte", "lt")
CONDITIONS = st.fixed_dictionaries(
    {},
    optional={
        "brand": st.sampled_from(BRANDS)
        | st.fixed_dictionaries({"in": st.lists(st.sampled_from([*BRANDS, "none"]), min_size=1)})
        | st.dictionaries(st.sampled_from(RANGES), st.sampled_from(BRANDS), min_size=1),
        "price": NUMBERS
        | st.fixed_dictionaries({"in": st.lists(NUMBERS, min_size=1)})
        | st.dictionaries(st.sampled_from(RANGES), NUMBERS, min_size=1),
        "new": st.booleans() | st.fixed_dictionaries({"exists": st.booleans()}),
        "tags": st.dictionaries(
            st.sampled_from(["any", "all"]),
            st.lists(st.sampled_from([*TAGS, "none"]), min_size=1),
            min_size=1,
        ),
    },
)
FILTERS = st.recursive(
    CONDITIONS,
    lambda below: st.builds(
        lambda own, more: {**own, **more},
        CONDITIONS,
        st.fixed_dictionaries(
            {}, optional={"not": below, "or": st.lists(below, min_size=1, max_size=2)}
        ),
    ),
    max_leaves=4,
)


def kept_by_hand(documents: dict[str, Metadata], said: dict[str, Any]) -> list[str]:
    return [doc_id for doc_id, document in documents.items() if meets(document, said)]


def shards_of(
    place: Path,
    vectors: dict[str, np.ndarray],
    documents: dict[str, Metadata],
    count: int,
    dim: int = 8,
) -> list[Shard]:
    loaded, doc_ids = [], list(vectors)
    for number in range(count):
        ids = doc_ids[number::count]
        rows = np.array([vectors[doc_id] for doc_id in ids], np.float32).reshape(len(ids), dim)
        folder = place / f"{number}-of-{count}"
        folder.mkdir(parents=True)
        build_shard(folder, table(ids), rows, Retrieval(), metadata=documents, kinds=KINDS)
        loaded.append(Shard.load(folder))
    return loaded


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    documents=st.lists(DOCUMENT, min_size=8, max_size=40),
    asked=st.lists(FILTERS, min_size=1, max_size=3),
    few=st.sampled_from([0, 20_000]),
    seed=st.integers(0, 99),
)
def test_a_filtered_search_is_a_search_of_the_subset(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[Metadata],
    asked: list[dict[str, Any]],
    few: int,
    seed: int,
) -> None:
    """Over 1, 2, 3 and 7 shards, with ties, by comparing all that is kept and through FAISS."""
    rng = np.random.default_rng(seed)
    known = {f"d{n:02d}": document for n, document in enumerate(documents)}
    rows = clustered(len(known), 8, seed)
    rows[len(rows) // 2 :] = rows[0]
    vectors = dict(zip(known, rows, strict=True))
    queries, k = np.concatenate([rows[:1], clustered(2, 8, seed + 1)]), int(rng.integers(1, 12))
    place = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "FEW", few)
        for count in (1, 2, 3, 7):
            shards = shards_of(place, vectors, known, count)
            for said in asked:
                found = Filter.model_validate(said)
                check(found, KINDS)
                subset = kept_by_hand(known, said)
                pieces = [s.search(queries, k, kept=s.kept(found.text)) for s in shards]
                for number, query in enumerate(queries):
                    scores = [
                        float(np.float32((vectors[d].astype("f8") * query.astype("f8")).sum()))
                        for d in subset
                    ]
                    expected = ranked(zip(scores, subset, strict=True), k)
                    assert merge([piece[number] for piece in pieces], k) == expected


def test_metadata_comes_back_as_it_was(tmp_path: Path) -> None:
    documents: list[Metadata | None] = [
        {"brand": "acme", "price": 5, "new": False, "tags": ["b", "a", "b"]},
        None,
        {"brand": "", "price": -0.25, "tags": []},
        {"price": 2**53},
    ]
    write_metadata(tmp_path, documents, KINDS)
    fields = Fields.load(tmp_path)
    assert [fields.at(row) for row in range(4)] == [document or {} for document in documents]
    assert json.dumps(fields.at(0)["price"]) == "5"
    index, documents = _one_row(tmp_path)
    shard = Shard(Finder(index), documents)
    with pytest.raises(ValueError, match="without metadata"):
        shard.kept("{}")


def test_a_shard_without_documents(tmp_path: Path) -> None:
    (shard,) = shards_of(tmp_path, {}, {}, 1, dim=4)
    text = Filter.model_validate({"brand": "acme", "not": {"tags": {"all": ["a"]}}}).text
    assert shard.kept(text).rows.tolist() == []
    assert shard.search(np.ones((1, 4), np.float32), 3, kept=shard.kept(text)) == [[]]


def _one_row(place: Path) -> tuple[Any, pa.Table]:
    from bixse.retrieval.library import faiss

    index = faiss.IndexFlatIP(2)
    index.add(np.ones((1, 2), np.float32))
    return index, table(["a"])


def test_rows_that_were_found_once_are_remembered(tmp_path: Path) -> None:
    write_metadata(tmp_path, [{"price": n} for n in range(10)], {"price": "number"})
    fields = Fields.load(tmp_path)
    texts = [Filter.model_validate({"price": {"gte": n}}).text for n in range(80)]
    first = fields.kept(texts[0])
    assert first.rows.tolist() == list(range(10))
    assert fields.kept(texts[0]) is first
    for text in texts[1:]:
        fields.kept(text)
    assert fields.kept(texts[0]) is not first, "the oldest are forgotten"


def test_all_is_one_pass_however_many_strings_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """31 conditions of 1,000 strings each were minutes on the one thread that searches."""
    many = [f"t{n}" for n in range(MOST_VALUES)]
    held = [many, many[1:], [*many, *many], [], None, [many[0]] * MOST_VALUES, ["t0", "t1", "t1"]]
    write_metadata(tmp_path, [{} if h is None else {"tags": h} for h in held], {"tags": "texts"})
    passes: list[Any] = []
    whole = filters._of_words
    monkeypatch.setattr(filters, "_of_words", lambda *of: (passes.append(of), whole(*of))[1])
    fields = Fields.load(tmp_path)
    for wanted, rows in (
        (many, [0, 2]),
        (["t1", "t0", "t1"], [0, 2, 6]),
        (["t0"], [0, 2, 5, 6]),
        (["t0", "none"], []),
    ):
        passes.clear()
        assert (
            fields.kept(Filter.model_validate({"tags": {"all": wanted}}).text).rows.tolist() == rows
        )
        assert len(passes) == 1


@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
def test_zero_is_one_number_whatever_its_sign(tmp_path: Path, zero: float) -> None:
    """Documents at -0.0 equalled 0 and were not in [0]."""
    held: list[Metadata | None] = [{"price": -0.0}, {"price": 0}, {"price": 1}, None]
    write_metadata(tmp_path, held, {"price": "number"})
    fields = Fields.load(tmp_path)
    for condition in (zero, {"in": [zero]}, {"in": [5, zero]}, {"gte": zero, "lte": zero}):
        said = Filter.model_validate({"price": condition})
        assert fields.kept(said.text).rows.tolist() == [0, 1], condition
    without = Filter.model_validate({"price": {"in": [1, 2]}})
    assert fields.kept(without.text).rows.tolist() == [2]


def test_equal_filters_have_equal_texts() -> None:
    one = Filter.model_validate({"price": {"lt": 3, "gte": 1}, "brand": "acme"})
    other = Filter.model_validate({"brand": {"eq": "acme"}, "price": {"gte": 1, "lt": 3}})
    assert one.text == other.text
    assert Filter.of(one.text) == one


def test_words_are_searched_among_the_kept_with_the_weights_of_all(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["aa", "bb", "cc", "dd", "ee", "ff"], 6)) for _ in range(60)]
    doc_ids = [f"d{n:02d}" for n in range(60)]
    settings_ = Lexical(language="none")
    whole = LexicalIndex(doc_ids, texts, settings_)
    corpus = Statistics.of([texts], "none")
    mask, queries = rng.random(60) < 0.3, ["aa bb", "ff", "zz"]
    pieces: list[list[list[Hit]]] = []
    for number in range(2):
        ids = doc_ids[number::2]
        folder = tmp_path / str(number)
        folder.mkdir()
        build_shard(folder, table(ids), clustered(len(ids), 8, 0), Retrieval())
        shard = Shard.load(folder)
        build_lexical(folder / "lexical", [texts[number::2]], corpus, settings_)
        lexical = LexicalShard.load(folder / "lexical", shard)
        found = lexical.rankings(queries, [5] * 3, shard, Kept.of(mask[number::2]))
        pieces.append([ranked(zip(f.scores, f.doc_ids, strict=True), 5) for f in found])
    for number, query in enumerate(queries):
        subset = [(h.score, h.doc_id) for h in whole.search(query, 60) if mask[int(h.doc_id[1:])]]
        assert merge([piece[number] for piece in pieces], 5) == ranked(subset, 5)


@pytest.mark.parametrize(
    ("said", "path", "sentence"),
    [
        ({"colour": "red"}, "filter.colour", "no field 'colour' here: there are brand, new, price"),
        ({"or": [{}, {"not": {"x": 1}}]}, "filter.or.1.not.x", "no field 'x' here"),
        ({"price": "5"}, "filter.price", "'price' holds numbers: eq is given \"5\""),
        ({"price": True}, "filter.price", "'price' holds numbers: eq is given true"),
        ({"brand": {"in": ["a", 1]}}, "filter.brand", "'brand' holds strings: in is given 1"),
        ({"tags": "red"}, "filter.tags", "lists of strings: ask with any all exists, not eq"),
        ({"new": {"gt": False}}, "filter.new", "true or false: ask with eq exists, not gt"),
        ({"brand": {"any": ["a"]}}, "filter.brand", "ask with eq in gte gt lte lt exists, not any"),
    ],
)
def test_what_an_index_cannot_answer_is_refused(
    said: dict[str, Any], path: str, sentence: str
) -> None:
    with pytest.raises(FilterError) as refused:
        check(Filter.model_validate(said), KINDS)
    assert refused.value.path == path
    assert sentence in str(refused.value)


def test_without_metadata_there_is_nothing_to_filter_by() -> None:
    with pytest.raises(FilterError, match="have no metadata"):
        check(Filter.model_validate({}), {})


@pytest.mark.parametrize(
    "said",
    [
        {"brand": None},
        {"brand": {}},
        {"brand": ["a"]},
        {"brand": {"like": "a"}},
        {"brand": {"in": []}},
        {"brand": "half \udfff"},
        {"price": float("nan")},
        {"price": 10**400},
        {"price": {"exists": 1}},
        {"price": {"gte": 5, "lt": None}},
        {"price": {"gte": 5, "in": None}},
        {"price": {"gte": 5, "exists": None}},
        {"price": 5, "not": None},
        {"price": 5, "or": None},
        {"or": []},
        {"not": 3},
        [],
    ],
    ids=repr,
)
def test_what_is_no_filter_is_refused(said: Any) -> None:
    with pytest.raises(ValidationError):
        Filter.model_validate(said)


@pytest.mark.parametrize(
    ("condition", "wrong"),
    [([{"brand": "a"}], "a list"), ({"brand": "a"}, "'brand'"), ({"$eq": 1}, "'$eq'")],
    ids=repr,
)
def test_a_word_that_other_filter_languages_have_is_answered_with_ours(
    condition: Any, wrong: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        Filter.model_validate({"and": condition})
    (error,) = refused.value.errors()
    assert wrong in error["msg"]
    assert "fields side by side must all hold" in error["msg"]
    assert error["loc"] == ("and",)


def test_the_operators_that_are_named_are_those_of_a_condition() -> None:
    fields = Condition.model_fields.items()
    assert [field.alias or name for name, field in fields] == list(filters._OPERATORS_OF_ALL)


@pytest.mark.parametrize("operator", ["not", "or"])
def test_the_schema_allows_no_null_where_none_is_taken(operator: str) -> None:
    said = Filter.model_json_schema()["$defs"]["Filter"]["properties"][operator]
    assert "null" not in json.dumps({**said, "default": ""})


def test_a_filter_that_would_take_too_long_is_refused() -> None:
    wide = Filter.model_validate({"or": [{"price": n} for n in range(MOST_CONDITIONS)]})
    with pytest.raises(ValueError, match="at most 64 conditions"):
        bounded(wide)
    said: dict[str, Any] = {"price": 1}
    for _ in range(9):
        said = {"not": said}
    with pytest.raises(ValueError, match="8 deep"):
        bounded(Filter.model_validate(said))
    assert bounded(Filter.model_validate(said["not"])) == Filter.model_validate(said["not"])

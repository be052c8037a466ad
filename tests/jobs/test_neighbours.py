"""Links to a trained encoder: what is read, what is refused, and the recipe from file to report."""

import json
import random
from pathlib import Path

import pytest

from bixse.artifacts import Artifact
from bixse.candidates.settings import Neighbours
from bixse.records import CORPUS, JUDGMENTS, QUERIES
from jobs.neighbours import anchors, import_links, judge_neighbours
from jobs.recipes.bixse import bixse
from jobs.recipes.ranking import scincl
from jobs.verbs import main
from tests.artifacts import artifact
from tests.encoders import WORDS, save_tiny_encoder

CACM = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "cacm"
BLOCKS, SIZE = 4, 25
WIDE = Neighbours(dimensions=32, positive=(0.0, 0.1), hard=(0.5, 0.6))


def rings() -> list[tuple[int, int]]:
    """Each document of a block linked with the next eight of it."""
    return [
        (block * SIZE + place, block * SIZE + (place + step) % SIZE)
        for block in range(BLOCKS)
        for place in range(SIZE)
        for step in range(1, 9)
    ]


def bodies() -> list[str]:
    """Of each block two words of its own among others, and five documents without a link."""
    draw = random.Random(0)
    own = [WORDS[2 * block : 2 * block + 2] for block in range(BLOCKS)]
    linked = [[*own[n // SIZE], *draw.choices(WORDS[8:], k=5)] for n in range(BLOCKS * SIZE)]
    alone = [draw.choices(WORDS[8:], k=7) for _ in range(5)]
    return [" ".join(draw.sample(words, 7)) for words in [*linked, *alone]]


def links_file(folder: Path, extra: str = "") -> str:
    lines = "".join(f"d{a:03}\td{b:03}\t5\n" for a, b in rings())
    (folder / "links.tsv").write_text(f"src\tdst\ttype\n{lines}{extra}")
    return str(folder / "links.tsv")


@pytest.fixture
def corpus(tmp_path: Path) -> Artifact:
    rows = [{"doc_id": f"d{n:03}", "title": "", "text": text} for n, text in enumerate(bodies())]
    return artifact(tmp_path / "corpus", "corpus", rows, CORPUS)


def given(tmp_path: Path, text: str = "something else") -> Artifact:
    row = {"query_id": "q", "text": text, "origin": "given"}
    return artifact(tmp_path / "given", "queries", [row], QUERIES)


def test_every_bad_line_is_a_rejection(tmp_path: Path, corpus: Artifact) -> None:
    file = links_file(tmp_path, "d000\td000\t5\nd000\tnowhere\t5\nd000\n\n")
    made = import_links(corpus, file, str(tmp_path / "links"))
    assert (made.manifest.rows, made.manifest.rejected) == (len(rings()), 3)
    rejected = made.rejected()
    assert rejected is not None
    assert rejected["reason"].to_pylist() == [
        "a document is linked with itself",
        "unknown doc_id",
        "expected 2 columns or more, found 1",
    ]
    assert rejected["line"].to_pylist() == [802, 803, 804]
    (tmp_path / "links.csv").write_text('a,b\n"d001","d002"\n')
    made = import_links(corpus, str(tmp_path / "links.csv"), str(tmp_path / "csv"))
    assert made.table().to_pylist() == [{"doc_id": "d001", "other_doc_id": "d002"}]


@pytest.mark.parametrize("head", ["", "\ufeff", "source,target\n"])
def test_a_first_line_that_is_a_link_is_no_header(
    head: str, tmp_path: Path, corpus: Artifact
) -> None:
    """It was passed over, and no rejection said so."""
    (tmp_path / "links.csv").write_text(f"{head}d001,d002\nd002, d003\n")
    made = import_links(corpus, str(tmp_path / "links.csv"), str(tmp_path / "links"))
    assert (made.manifest.rows, made.manifest.rejected) == (2, 0)


def test_what_is_no_graph_of_the_corpus_is_refused(tmp_path: Path, corpus: Artifact) -> None:
    with pytest.raises(ValueError, match=r"set --neighbours\.links"):
        import_links(corpus, "", str(tmp_path / "links"))
    (tmp_path / "links.tsv").write_text("a\tb\nx\ty\n")
    with pytest.raises(
        ValueError, match=r"no link between two known documents in .*unknown doc_id"
    ):
        import_links(corpus, str(tmp_path / "links.tsv"), str(tmp_path / "links"))
    with pytest.raises(ValueError, match="neighbours is of recipes with a graph"):
        scincl().replace(judging=bixse().judging)
    with pytest.raises(ValueError, match="neighbours is of recipes with a graph"):
        bixse().replace(neighbours=Neighbours())


def test_linked_documents_are_asked_with_near_and_far_ones(
    tmp_path: Path, corpus: Artifact
) -> None:
    # The text of d003 is a given query, which an evaluation may hold.
    links = import_links(corpus, links_file(tmp_path), str(tmp_path / "links"))
    asked = anchors(links, corpus, given(tmp_path, bodies()[3].upper()), str(tmp_path / "anchors"))
    assert (asked.manifest.rows, asked.manifest.rejected) == (BLOCKS * SIZE - 1, 1)
    rejected = asked.rejected()
    assert rejected is not None
    assert rejected.to_pylist()[0]["doc_id"] == "d003"
    rows = {row["query_id"]: row for row in asked.table().to_pylist()}
    assert rows["anchor:d004"]["text"] == bodies()[4]
    assert rows["anchor:d004"]["seed_doc_id"] == "d004"

    made = judge_neighbours(links, asked, corpus, WIDE, str(tmp_path / "judgments"))
    assert made.table().schema == JUDGMENTS
    found: dict[str, dict[str, float]] = {}
    for row in made.table().to_pylist():
        assert row["grade_probs"] == [1 - row["relevance"], row["relevance"]]
        assert row["origin"] == "links"
        found.setdefault(row["query_id"], {})[row["doc_id"]] = row["relevance"]
    assert set(found) == set(rows)
    for query_id, judged in found.items():
        own = int(query_id.removeprefix("anchor:d"))
        near = {int(d[1:]) for d, relevance in judged.items() if relevance == 1}
        far = {int(d[1:]) for d, relevance in judged.items() if relevance == 0}
        assert (len(near), len(far)) == (5, 5)
        assert own not in near | far
        assert {other // SIZE for other in near} == {own // SIZE}
        assert own // SIZE not in {other // SIZE for other in far}
        assert max(near | far) < BLOCKS * SIZE
    again = judge_neighbours(links, asked, corpus, WIDE, str(tmp_path / "again"))
    assert again.table() == made.table()
    other = judge_neighbours(links, asked, corpus, WIDE.replace(seed=1), str(tmp_path / "other"))
    assert other.table() != made.table()


def test_too_few_documents_for_the_bands_are_refused(tmp_path: Path, corpus: Artifact) -> None:
    links = import_links(corpus, links_file(tmp_path), str(tmp_path / "links"))
    asked = anchors(links, corpus, given(tmp_path), str(tmp_path / "anchors"))
    with pytest.raises(ValueError, match="positive band holds 1 documents, 5 are asked of it"):
        judge_neighbours(links, asked, corpus, Neighbours(), str(tmp_path / "judgments"))
    far = WIDE.replace(hard=(0.9, 1.0))
    with pytest.raises(ValueError, match="has 99 neighbours, the bands reach to 100"):
        judge_neighbours(links, asked, corpus, far, str(tmp_path / "judgments"))
    # Nothing was made: other bands may begin there.
    judge_neighbours(links, asked, corpus, WIDE, str(tmp_path / "judgments"))


def test_no_copy_is_far_from_what_it_is_a_copy_of(tmp_path: Path) -> None:
    """Equal texts are one document to training: a copy of the anchor was judged irrelevant to it,
    and one of a positive made the mean of both."""
    # Every other document has a text of its own, the others share three.
    texts = [f"text {n}" if n % 2 else f"shared {n % 3}" for n in range(BLOCKS * SIZE)]
    rows = [{"doc_id": f"d{n:03}", "title": "", "text": text} for n, text in enumerate(texts)]
    corpus = artifact(tmp_path / "corpus", "corpus", rows, CORPUS)
    links = import_links(corpus, links_file(tmp_path), str(tmp_path / "links"))
    asked = anchors(links, corpus, given(tmp_path), str(tmp_path / "anchors"))
    made = judge_neighbours(links, asked, corpus, WIDE, str(tmp_path / "judgments"))
    grades: dict[tuple[str, str], set[float]] = {}
    for row in made.table().to_pylist():
        key = row["query_id"], texts[int(row["doc_id"][1:])]
        grades.setdefault(key, set()).add(row["relevance"])
        assert key[1] != texts[int(row["query_id"].removeprefix("anchor:d"))]
    assert all(len(found) == 1 for found in grades.values())
    rejected = made.rejected()
    assert rejected is not None
    assert set(rejected["reason"].to_pylist()) == {
        "has the text of its anchor",
        "has the text of a positive",
    }
    assert made.manifest.rows + made.manifest.rejected == 10 * asked.manifest.rows


@pytest.mark.slow
def test_the_recipe_runs_from_links_to_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Queries are documents without a link: words of a block bring the block's documents."""
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": f"d{n:03}", "text": text}) for n, text in enumerate(bodies())]
    (data / "corpus.jsonl").write_text("\n".join(lines))
    draw = random.Random(1)
    asked = {
        f"q{n}": " ".join([*WORDS[2 * (n % BLOCKS) :][:2], *draw.choices(WORDS[8:], k=3)])
        for n in range(12)
    }
    lines = [json.dumps({"_id": query_id, "text": text}) for query_id, text in asked.items()]
    (data / "queries.jsonl").write_text("\n".join(lines))
    grades = [
        f"q{n}\td{document:03}\t1"
        for n in range(12)
        for document in range(SIZE * (n % BLOCKS), SIZE * (n % BLOCKS + 1))
    ]
    (data / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *grades]))
    out, start = tmp_path / "out", str(save_tiny_encoder(tmp_path / "start"))
    flags = ["--data", str(data), "--out", str(out), "--start", start, "--json"]
    flags += ["--neighbours.links", links_file(tmp_path), "--neighbours.dimensions", "32"]
    flags += ["--neighbours.positive", "0", "0.1", "--neighbours.hard", "0.5", "0.6"]
    flags += ["--training.epochs", "6", "--training.learning-rate", "2e-3"]
    main("pipeline", ["scincl", *flags])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["ndcg@10"]["trained"] > summary["ndcg@10"]["base"] + 0.08
    encoder = Artifact.open(str(out / "encoder"))
    assert encoder.manifest.inputs["judgments"] == Artifact.open(f"{out}/judgments").fingerprint
    curve = [json.loads(line) for line in encoder.place.read("training.jsonl").splitlines()]
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]


@pytest.mark.skipif(not CACM.is_dir(), reason="needs ../shared/data/cacm, a corpus with citations")
def test_neighbours_of_real_articles_share_their_subject(tmp_path: Path) -> None:
    """A title shares words with those of its positives more often than of its negatives."""
    lines = [json.loads(line) for line in (CACM / "corpus.jsonl").read_text().splitlines()]
    titles = {line["_id"]: line["title"] for line in lines}
    rows = [{"doc_id": d, "title": title, "text": "."} for d, title in titles.items()]
    corpus = artifact(tmp_path / "corpus", "corpus", rows, CORPUS)
    links = import_links(corpus, str(CACM / "citation_graph.tsv"), str(tmp_path / "links"))
    assert (links.manifest.rows, links.manifest.rejected) == (28_410, 0)
    asked = anchors(links, corpus, given(tmp_path), str(tmp_path / "anchors"))
    made = judge_neighbours(links, asked, corpus, Neighbours(), str(tmp_path / "judgments"))
    # Some articles have the title of another.
    assert made.manifest.rows + made.manifest.rejected == 10 * asked.manifest.rows
    assert made.manifest.rejected < 0.01 * made.manifest.rows
    shared: dict[float, list[bool]] = {0.0: [], 1.0: []}
    for row in made.table(["query_id", "doc_id", "relevance"]).to_pylist():
        words, others = (
            {word for word in titles[doc_id].lower().split() if len(word) > 4}
            for doc_id in (row["query_id"].removeprefix("anchor:"), row["doc_id"])
        )
        shared[row["relevance"]].append(bool(words & others))
    near, far = (sum(shared[side]) / len(shared[side]) for side in (1.0, 0.0))
    assert near > 2 * far

"""nDCG@10 on dev while training: the number that `evaluate` gives, on any number of ranks."""

import json
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from bixse.artifacts import Artifact
from bixse.evaluation.settings import Evaluation
from bixse.models.encoder import Encoder
from bixse.records import JUDGMENTS
from bixse.retrieval.settings import Lexical
from bixse.training.gather import World
from jobs.embed import embed
from jobs.evaluate import evaluate
from jobs.following import note_of
from jobs.measuring import DevSplit, dev_ndcg, dev_split, refuse_trained
from jobs.recipe import Placement
from jobs.train import train
from tests.artifacts import artifact
from tests.encoders import save_tiny_encoder
from tests.jobs import test_train as trains

QRELS = pa.schema([("split", pa.string()), *JUDGMENTS])
SETTINGS = trains.SETTINGS.replace(evaluate_every=7, epochs=6, precision="float32")


def qrels(path: Path, split: str = "dev") -> Artifact:
    fields = {"grade_probs": [1.0], "judge": "test", "prompt": "", "origin": "human"}
    rows = [
        {
            "split": split if q >= 12 else "train",
            "query_id": f"q{q}",
            "doc_id": f"d{(q * 7 + k) % 30}",
            "relevance": grade,
            **fields,
        }
        for q in range(24)
        for k, grade in enumerate((1.0, 0.5, 0.25))
    ]
    return artifact(path / f"qrels-{split}", "qrels", rows, QRELS)


def judged(path: Path) -> Artifact:
    """Judgments of the queries that are not in dev."""
    rows = [
        (f"q{q}", f"d{(q * 7 + k) % 30}", grade)
        for q in range(12)
        for k, grade in enumerate((1.0, 0.5, 0.0))
    ]
    return trains.judgments(path / "of-train", rows)


def dev_at(path: Path) -> DevSplit:
    _, (queries,), corpus = trains.inputs(path)
    return dev_split(corpus, queries, qrels(path))


def train_at(path: Path, out: str) -> Artifact:
    _, queries, corpus = trains.inputs(path)
    start = str(path / "start" / "encoder")
    return train(
        judged(path),
        queries,
        corpus,
        SETTINGS,
        start,
        Placement(),
        str(path / out),
        dev=dev_at(path),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measuring")
    save_tiny_encoder(path / "start", {"query": "ask: ", "document": "tell: "})
    return path


@pytest.mark.slow
def test_the_number_is_that_of_evaluate_at_the_base_and_at_the_best(place: Path) -> None:
    made = train_at(place, "made")
    lines = [json.loads(line) for line in made.place.read("dev.jsonl").splitlines()]
    assert [line["step"] for line in lines] == [0, 7, 14, 21, 28, 30]
    assert [[line["step"], line["ndcg@10"]] for line in lines] == made.manifest.extra["dev_ndcg@10"]
    (best,) = (line for line in lines if line["best"])
    assert best["step"] == made.manifest.extra["best_step"]
    assert best["ndcg@10"] == max(line["ndcg@10"] for line in lines)
    _, (queries,), corpus = trains.inputs(place)
    systems = {}
    for name, path in (("base", str(place / "start" / "encoder")), ("trained", made.url)):
        systems[name] = path, embed(corpus, path, Placement(), str(place / f"embeddings-{name}"))
    report = evaluate(
        corpus,
        queries,
        qrels(place),
        "dev",
        systems,
        Lexical(),
        Evaluation(bootstrap=100),
        [],
        "a recipe",
        {},
        str(place / "report"),
    )
    found = report.manifest.extra["ndcg@10"]
    # Each rounds documents to bfloat16 in its own way: near ties may change places.
    assert lines[0]["ndcg@10"] == pytest.approx(found["base"], abs=5e-3)
    assert best["ndcg@10"] == pytest.approx(found["trained"], abs=5e-3)
    page = report.place.read("report.html").decode()
    assert "Dev split while training" in page
    assert f"{best['ndcg@10']:.3f} at step {best['step']}" in page


@pytest.mark.slow
def test_a_killed_driver_goes_on_to_the_same_best_encoder(place: Path) -> None:
    whole = train_at(place, "made")
    with trains.driver_at(place, "killed", 10, "tests.jobs.test_measuring"):
        pass
    assert not (place / "killed" / "manifest.json").exists()
    again = train_at(place, "killed")
    for name in ("training.jsonl", "dev.jsonl"):
        assert again.place.read(name) == whole.place.read(name)
    assert again.fingerprint == whole.fingerprint


def test_shares_of_the_corpus_give_the_ranking_of_the_whole(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed as dist

    dev = dev_at(place)
    start = str(place / "start" / "encoder")
    whole = dev_ndcg(dev, Encoder.load(start, "cpu"), World())
    assert 0 < whole < 1
    # Two ranks as two threads, meeting where the process group would let them meet.
    meeting = threading.Barrier(2)
    held: list[object] = [None, None]

    def gather(into: list[object], mine: object) -> None:
        held[int(threading.current_thread().name)] = mine
        meeting.wait()
        into[:] = held

    monkeypatch.setattr(dist, "all_gather_object", gather)
    found = {}

    def rank(number: int) -> None:
        found[number] = dev_ndcg(dev, Encoder.load(start, "cpu"), World(number, 2))

    threads = [threading.Thread(target=rank, args=(n,), name=str(n)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == pytest.approx(whole, abs=2e-3)


def test_no_dev_split_is_one_sentence(place: Path) -> None:
    _, (queries,), corpus = trains.inputs(place)
    with pytest.raises(ValueError, match=r"judged queries of a dev split.*qrels/dev\.tsv"):
        dev_split(corpus, queries, qrels(place, "test"))


def test_training_reads_no_dev_query(place: Path, tmp_path: Path) -> None:
    judgments, queries, corpus = trains.inputs(place)
    out, start = tmp_path / "out", str(place / "start" / "encoder")
    with pytest.raises(ValueError, match="12 dev queries stand in training too, first 'q12'"):
        train(judgments, queries, corpus, SETTINGS, start, Placement(), str(out), dev=dev_at(place))
    with pytest.raises(ValueError, match="go together"):
        train(judgments, queries, corpus, SETTINGS, start, Placement(), str(out))
    assert not out.exists()
    refuse_trained(dev_at(place), trains.QUERY_TEXTS[:12])


def test_the_line_of_the_driver() -> None:
    from bixse.training.seen import Seen

    line = {"loss": 0.25, "excess": 0.125, "pairs": 100, "seconds": 0.1}
    assert note_of(Seen(0, [], [])) == ""
    assert note_of(Seen(0, [], [(0, 0.4)])) == "dev nDCG@10 0.400 (best 0.400 at 0)"
    assert note_of(Seen(20, [line], [(0, 0.4), (10, 0.45), (20, 0.41)])) == (
        "loss 0.25, 0.125 over labels, 1,000 pairs/s, dev nDCG@10 0.410 (best 0.450 at 10)"
    )

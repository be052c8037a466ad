"""Eight documents, seven judged queries and two encoders: what evaluation is tested on."""

from dataclasses import dataclass

from bixse.artifacts import Artifact, begin
from bixse.evaluation.settings import Evaluation
from bixse.models.encoder import Encoder, load_model
from bixse.models.settings import PACKAGED
from bixse.records import CORPUS, QRELS, QUERIES
from bixse.retrieval.settings import Lexical
from jobs.embed import EmbedUnit
from jobs.evaluate import evaluate
from jobs.recipe import Placement
from tests.artifacts import artifact

DOCUMENTS = {
    "json dumps": "json.dumps serialises an object to a JSON formatted string",
    "json loads": "json.loads reads a JSON document from a string",
    "csv": "csv.reader gives the rows of a file of comma separated values",
    "sort": "sorted gives a new list with the items in rising order",
    "100%": "round gives a number rounded to a number of digits",
    "thread": "a thread pool runs calls in several threads at once",
    "sleep": "time.sleep suspends the calling thread for some seconds",
    "hash": "hashlib gives secure digests such as SHA-256",
}
GIVEN = {
    "q 1": "turn an object into JSON text",
    "q 2": "parse JSON",
    "q 3": "read comma separated values",
    "q 4": "order the items of a list",
    "q 5": "wait a few seconds",
    "t 1": "checksum of a file",
    "t 2": "run calls at the same time",
}
GRADES = {  # of 0 to 3
    "q 1": {"json dumps": 3, "json loads": 1, "csv": 0},
    "q 2": {"json loads": 3, "json dumps": 1},
    "q 3": {"csv": 3, "json loads": 1},
    "q 4": {"sort": 2},
    "q 5": {"hash": 0},
    "t 1": {"hash": 3},
    "t 2": {"thread": 3},
}
SETTINGS = Evaluation(bootstrap=200)


def queries_artifact(url, texts, origin="given") -> Artifact:
    rows = [
        {"query_id": query_id, "text": text, "origin": origin} for query_id, text in texts.items()
    ]
    return artifact(url, "queries", rows, QUERIES)


def qrels_artifact(url, grades=GRADES, split=None) -> Artifact:
    """Of one split, or of test where the id begins with q."""
    rows = []
    for query_id, judged in grades.items():
        for doc_id, grade in judged.items():
            probs = [float(n == grade) for n in range(4)]
            home = "test" if query_id.startswith("q") else "train"
            rows.append(
                {
                    "split": split or home,
                    "query_id": query_id,
                    "doc_id": doc_id,
                    "grade_probs": probs,
                    "relevance": grade / 3,
                    "judge": "given",
                    "prompt": "",
                    "origin": "human",
                }
            )
    return artifact(url, "qrels", rows, QRELS, scale=[0.0, 1.0, 2.0, 3.0])


def embeddings_artifact(url, corpus, encoder) -> Artifact:
    """What jobs.embed makes, in two parts and without Ray; its order is not that of doc_id."""
    inputs = {"documents": corpus.rows_fingerprint, "encoder": Encoder.load(encoder).fingerprint}
    draft = begin(str(url), "embeddings", config={}, inputs=inputs)
    rows, _ = EmbedUnit(encoder, inputs["encoder"], Placement())(corpus.table())
    draft.write_part(0, rows.slice(0, 5))
    draft.write_part(1, rows.slice(5))
    return draft.finish(extra={"encoder": inputs["encoder"]})


@dataclass(frozen=True)
class World:
    corpus: Artifact
    queries: Artifact
    qrels: Artifact
    encoders: dict[str, tuple[str, Artifact]]


def make_world(root) -> World:
    """The second encoder is the first with every weight a hundredth larger."""
    rows = [{"doc_id": d, "title": "", "text": text} for d, text in DOCUMENTS.items()]
    corpus = artifact(root / "corpus", "corpus", rows, CORPUS)
    model = load_model(PACKAGED, "cpu")
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    model.save(str(root / "trained"))
    encoders = {"base": PACKAGED, "trained": str(root / "trained")}
    return World(
        corpus,
        queries_artifact(root / "queries", GIVEN),
        qrels_artifact(root / "qrels"),
        {
            name: (encoder, embeddings_artifact(root / f"embeddings-{name}", corpus, encoder))
            for name, encoder in encoders.items()
        },
    )


def run(world, out, split="test", **changes) -> Artifact:
    arguments = {
        "corpus": world.corpus,
        "queries": world.queries,
        "qrels": world.qrels,
        "split": split,
        "encoders": world.encoders,
        "lexical": Lexical(),
        "settings": SETTINGS,
        "trained_on": [world.queries],
        "recipe_name": "test",
        "seconds": {"train": 1.5},
        "out": str(out),
    }
    return evaluate(**(arguments | changes))

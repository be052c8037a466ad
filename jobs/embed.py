"""corpus, encoder -> embeddings: an actor pool of encoders over units of the corpus."""

import os
from typing import Any

import pyarrow as pa

from bixse.artifacts import Artifact, begin
from bixse.models.encoder import Encoder, encoder_fingerprint, refuse_no_model, resolve
from bixse.records import Rejection, document_text, embeddings_schema
from jobs.cluster import tokenise_on_cores
from jobs.parts import row_units, run_units
from jobs.recipe import Placement

UNIT_ROWS = 1024


def embed(corpus: Artifact, encoder: str, placement: Placement, out: str) -> Artifact:
    """One unit vector a document, float32, in the order of the corpus.

    Of the corpus its rows count alone: other metadata beside them embeds nothing again.

    Raises ValueError when there is no such encoder.
    """
    directory = resolve(encoder)
    refuse_no_model(directory, encoder)
    fingerprint = encoder_fingerprint(directory)
    inputs = {"documents": corpus.rows_fingerprint, "encoder": fingerprint}
    draft = begin(out, "embeddings", config={"unit_rows": UNIT_ROWS}, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    run_units(
        draft,
        row_units(corpus, UNIT_ROWS),
        EmbedUnit,
        (encoder, fingerprint, placement),
        label="embed",
        actors=placement.embed_actors,
        cpus=placement.cpus_per_actor,
        gpus=placement.gpus_per_actor,
    )
    return draft.finish(device=placement.device, extra={"encoder": fingerprint})


class EmbedUnit:
    """Reads: doc_id, title, text. Adds: vector."""

    def __init__(self, encoder: str, fingerprint: str, placement: Placement) -> None:
        """Raises ValueError when this node finds another encoder under that name."""
        import torch

        # Ray gives an actor one thread for each CPU it reserves; the cores are there for all.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // placement.embed_actors))
        tokenise_on_cores()
        self._encoder = Encoder.load(encoder, placement.device)
        if self._encoder.fingerprint != fingerprint:
            raise ValueError(
                f"{encoder} is encoder {self._encoder.fingerprint} on a worker, "
                f"{fingerprint} on the driver"
            )
        self._tokens = placement.encode_tokens

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        titles, texts = rows["title"].to_pylist(), rows["text"].to_pylist()
        joined = [document_text(t, x) for t, x in zip(titles, texts, strict=True)]
        vectors = self._encoder.encode(joined, "document", self._tokens)
        columns: list[Any] = [
            rows["doc_id"].combine_chunks(),
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), self._encoder.dim),
        ]
        return pa.table(columns, schema=embeddings_schema(self._encoder.dim)), []


if __name__ == "__main__":
    from jobs.verbs import program

    program("embed")

"""An encoder -> one of fewer dimensions: its vectors cut to the leading ones.

Worth it for an encoder that was trained for it (`training.dimensions`). The artefact is a
sentence-transformers directory like any other; an index of it is smaller by the same factor. How
the whole one was trained stays beside it, for a report.
"""

import shutil
import tempfile
from pathlib import Path

from bixse.artifacts import Artifact, begin
from bixse.models.encoder import encoder_fingerprint, load_model, resolve, truncated
from bixse.training.seen import CURVE, DEV_CURVE
from jobs.measuring import chosen_on


def refuse_narrow(encoder: str, dimensions: int) -> None:
    """Raises ValueError as `truncate`, which could not cut it to so many; makes nothing."""
    truncated(load_model(encoder, "cpu"), dimensions)


def truncate(encoder: str, dimensions: int, out: str) -> Artifact:
    """The encoder with so many dimensions at `out`.

    Raises ValueError when there is no such encoder or it has no more dimensions than that.
    """
    directory = resolve(encoder)
    inputs = {"encoder": encoder_fingerprint(directory), **chosen_on(directory)}
    model = truncated(load_model(encoder, "cpu"), dimensions)
    draft = begin(out, "encoder", config={"dimensions": dimensions}, inputs=inputs)
    if isinstance(draft, Artifact):
        return draft
    with tempfile.TemporaryDirectory() as aside:
        model.save_pretrained(aside, create_model_card=False)
        for curve in (directory / CURVE, directory / DEV_CURVE):
            if curve.exists():
                shutil.copy(curve, aside)
        draft.add_directory(Path(aside))
        fingerprint = encoder_fingerprint(Path(aside))
    return draft.finish(rows=dimensions, extra={"encoder": fingerprint})

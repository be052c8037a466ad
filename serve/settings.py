"""What is served, and within which bounds."""

from dataclasses import dataclass

from pydantic import Field, ValidationError

from bixse.artifacts import Artifact, ArtifactError
from bixse.settings import Settings


class ServeArgs(Settings):
    """Arguments of `python -m serve.app --name value` and `serve run serve.app:build name=value`.

    Flat, because `serve run` passes plain `name=value` pairs.
    """

    index: str
    """URL of the index artefact."""
    encoder: str
    """The index's encoder: a directory (on every node), a hub id, or the packaged one."""
    model: str = "bixse"
    """The name by which `/v1/embeddings` knows the encoder, besides its fingerprint."""
    keys_file: str | None = None
    """File of `role:key` lines (roles search, monitor); unset reads the variable BIXSE_KEYS."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback needs keys."""
    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port."""
    max_k: int = Field(default=1000, ge=1)
    """Most hits a request may ask for."""
    max_queries: int = Field(default=256, ge=1)
    """Most queries or embedding inputs in one request."""
    max_hits: int = Field(default=20_000, ge=1)
    """Most hits in one reply: queries times k."""
    max_text_length: int = Field(default=8192, ge=1)
    """Longest query or embedding input, in characters."""
    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    """Largest request body."""
    max_in_flight: int = Field(default=256, ge=1)
    """Requests worked on at a time; one more is answered 429."""
    default_timeout_ms: int = Field(default=10_000, ge=1)
    """Deadline of a request that sets none."""
    max_timeout_ms: int = Field(default=60_000, ge=1)
    """Longest deadline a request may set."""
    batch_size: int = Field(default=32, ge=1)
    """Most queries in one call to the encoder or to a shard."""
    batch_wait_ms: float = Field(default=1.0, ge=0)
    """How long a batch that is not full waits for company."""
    encoder_replicas: int = Field(default=1, ge=1)
    """Copies of the encoder."""
    encoder_cpus: int = Field(default=1, ge=1)
    """CPUs and threads of each encoder replica."""
    encoder_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each encoder replica."""
    replicas_per_shard: int = Field(default=1, ge=1)
    """Copies of each shard; with two, the loss of one costs no coverage."""
    shard_cpus: int = Field(default=1, ge=1)
    """CPUs and threads of each shard replica."""


class Canary(Settings):
    """A query whose best document was known when the index was built."""

    query: str
    doc_id: str
    score: float


@dataclass(frozen=True)
class ServedIndex:
    """What the manifest of an index says to those who serve it."""

    url: str
    fingerprint: str
    encoder: str
    dim: int
    shard_rows: dict[str, int]
    canary: Canary

    @classmethod
    def read(cls, url: str) -> "ServedIndex":
        """Read the manifest only; each shard replica verifies its own files.

        Raises ArtifactError when there is no index, or its manifest lacks what serving needs.
        """
        artifact = Artifact.open(url, "index", verify=False)
        extra = artifact.manifest.extra
        try:
            counts = [int(count) for count in extra["shard_rows"]]
            rows = dict(zip(extra["shards"], counts, strict=True))
            canary = Canary.model_validate(extra["canary"])
            encoder, dim = str(extra["encoder"]), int(extra["dim"])
        except KeyError as error:
            raise ArtifactError(f"the manifest of {url} does not say {error}") from None
        except (ValidationError, ValueError, TypeError):
            raise ArtifactError(
                f"the manifest of {url} says shards, dim or canary in a form unknown here"
            ) from None
        # A small corpus may leave shards empty: nothing can be missing from them.
        rows = {name: count for name, count in rows.items() if count}
        if not rows:
            raise ArtifactError(f"the index {url} holds no document")
        return cls(url, artifact.fingerprint, encoder, dim, rows, canary)

    def check_encoder(self, start: str, fingerprint: str) -> None:
        """Raises ValueError, naming both fingerprints, when another encoder made this index."""
        if fingerprint != self.encoder:
            raise ValueError(
                f"the index {self.url} was made by encoder {self.encoder}, but {start} is encoder "
                f"{fingerprint}: serve it with its own encoder, or index again"
            )

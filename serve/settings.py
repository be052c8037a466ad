"""What is served, and within which bounds."""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from bixse.artifacts import Artifact, ArtifactError
from bixse.copies import leave
from bixse.records import Kind
from bixse.settings import Precision, Settings

ROUTER_LOOP = "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"

Mode = Literal["dense", "lexical", "hybrid"]
"""By vectors, by words, or by both."""

MOST_TEXTS = 65_536
"""The longest list in one request: a longer one is refused unread."""


class ServeArgs(Settings):
    """Arguments of `python -m serve.app --name value` and `serve run serve.app:build name=value`.

    Flat, because `serve run` passes plain `name=value` pairs.
    """

    index: str
    """URL of the index artefact. `/admin/generation` turns to another until the application ends:
    a start begins with this one again."""
    encoder: str
    """The index's encoder: a directory (on every node), a hub id, or the packaged one."""
    model: str = "bixse"
    """The name by which `/v1/embeddings` knows the encoder, besides its fingerprint."""
    keys_file: str | None = None
    """File of `role:key` lines (roles search, monitor, admin); unset reads BIXSE_KEYS."""
    query_precision: Precision = "float32"
    """What queries are multiplied in on a CPU. auto: bfloat16 where the CPU has instructions for it
    (AMX, AVX512-BF16), more than twice as fast for full batches; near ties may then fall otherwise
    from batch to batch."""
    topology: Literal["shard", "replicate"] = "shard"
    """shard: an encoder, and each shard in a replica of its own: for indexes that fill a node.
    replicate: encoder and all shards in each replica, no hops between: for all that fit."""
    replicas: int = Field(default=1, ge=1)
    """Copies of everything, with `--topology replicate`. `/metrics` is of one of them at a time,
    named by the label `replica`."""
    profile: Literal["default", "fast"] = "default"
    """fast: HAProxy in front of the replicas (ray[serve] brings it on Linux), no TLS. Replicas then
    listen on --host too, from port 30000 on, and HAProxy's statistics on all interfaces, ports 8404
    and 9101: keep a firewall before those. While no replica can answer, HAProxy says 404 or 500 in
    plain text, outside the error envelope, and it closes the connections of one that died."""
    tls_certificate: str | None = None
    """PEM file, on every node, with the certificate chain; with `--tls-key`, HTTPS only."""
    tls_key: str | None = None
    """PEM file with the certificate's private key."""
    plan: bool = False
    """Print what this would take and what losing a node would cost, and start nothing."""
    requests_per_s: float | None = Field(default=None, gt=0)
    """Most requests a second of one key, at each replica that takes requests; unset is no limit."""
    requests_burst: int = Field(default=50, ge=1)
    """Requests of one key that may come at once before `--requests-per-s` holds."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback needs keys."""
    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port."""
    max_k: int = Field(default=1000, ge=1)
    """Most hits a request may ask for."""
    max_queries: int = Field(default=256, ge=1, le=MOST_TEXTS)
    """Most queries or embedding inputs in one request, 65,536 at the most."""
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
    shard_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each shard replica, on which exact and ivf_flat are then searched; with `--topology
    replicate` they come to those of the encoder. Needs faiss-gpu. All generations that are held
    must fit: see `--plan`."""
    reranker: str | None = None
    """A trained cross-encoder, for requests that ask for `rerank`: a directory (on every node), the
    URL of an artefact of kind `reranker`, or a hub id. It is a deployment of its own in both
    topologies, and stays when the index changes unless `/admin/generation` names another. Whether
    it pays, with intervals: `python -m jobs.evaluate lce --data DIR --encoder PATH --out DIR`."""
    max_rerank: int = Field(default=1000, ge=1)
    """Most documents that the reranker reads for one request: queries times `rerank`."""
    rerank_batch_size: int = Field(default=64, ge=1)
    """Most pairs of query and document in one call to the reranker."""
    rerank_batch_tokens: int = Field(default=16_384, ge=1)
    """Most tokens, padding included, that a reranker multiplies at a time."""
    rerank_waiting: int = Field(default=4000, ge=1)
    """Where so many pairs wait for the reranker already, further requests do without (`shed`)."""
    reranker_replicas: int = Field(default=1, ge=1)
    """Copies of the reranker."""
    reranker_cpus: int = Field(default=1, ge=1)
    """CPUs and threads of each reranker replica."""
    reranker_gpus: float = Field(default=0.0, ge=0)
    """GPUs of each reranker replica."""
    reranker_precision: Precision = "float32"
    """What the reranker's weights are. auto: bfloat16 on a GPU, and on a CPU that has instructions
    for it (4.4 times the pairs a second, MiniLM, one core with AMX), but for its head, and none of
    it where the score is a token's; near ties may then fall otherwise from batch to batch."""
    drain_within_s: float = Field(default=30, ge=0)
    """On SIGTERM new requests are refused, and those under way have so long to be answered."""
    load_within_s: float = Field(default=600, gt=0)
    """How long a new generation may take to load before it is given up."""
    request_log: str | None = None
    """Directory, on every node, for a JSON line a search: the query, what was shown, and by which
    generation. Unset writes nothing. Queries are personal data: see `serve/request_log.py`."""
    request_log_bytes: int = Field(default=64 << 20, ge=1)
    """Size, about, at which a file of the request log is followed by the next."""
    request_log_files: int = Field(default=32, ge=2)
    """Files kept in that directory; the oldest go."""
    policy: str = "bixse"
    """What the request log calls this application's way to rank, to tell experiments apart."""
    swap_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the lists of `/search` in which two neighbours among the first 20 change places, so
    that clicks tell what a rank does from what a document is worth (recipe `two_tower`): .1 is
    plenty. The request log says which; scores stay with their documents, and there do not fall."""
    least_recall: float = Field(default=0.9, ge=0, le=1)
    """A new index whose measured recall@10 is lower is refused."""
    gate_queries: str | None = None
    """URL of a `queries` artefact: with `--gate-judgments`, a new generation must hold its own."""
    gate_judgments: str | None = None
    """URL of a `judgments` artefact, held out from training."""
    gate_ndcg_drop: float = Field(default=0.02, ge=0, le=1)
    """Most nDCG@10 on those judgments that a new generation may lose against the one served: of
    what it finds and, with `--reranker`, of what that makes of it."""
    gate_rerank: int = Field(default=50, ge=10)
    """Hits of each held-out query that the reranker reads for that: the `rerank` of your requests.
    It reads them one query at a time, beside those requests."""

    @model_validator(mode="after")
    def _gate_is_whole(self) -> "ServeArgs":
        if (self.gate_queries is None) != (self.gate_judgments is None):
            raise ValueError("give both --gate-queries and --gate-judgments, or neither")
        return self

    @model_validator(mode="after")
    def _swaps_are_told(self) -> "ServeArgs":
        if self.swap_share and self.request_log is None:
            raise ValueError("--swap-share changes lists for --request-log: give both")
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "ServeArgs":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("give both --tls-certificate and --tls-key, or neither")
        if self.tls_certificate is not None and self.profile == "fast":
            raise ValueError("the fast profile has no TLS: end it in front of HAProxy")
        return self

    def ray_variables(self) -> dict[str, str]:
        """Environment of Ray that these arguments want, where Ray is started."""
        wanted = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy.middlewares"}
        if self.profile == "fast":
            wanted |= {
                "RAY_SERVE_ENABLE_HA_PROXY": "1",
                # One event loop a replica, health checks included: what blocks is on threads and in
                # processes of our own.
                "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
                # It sends calls between replicas by gRPC, which ends at 4 MiB otherwise: less than
                # the documents that a shard finds for a batch of queries.
                "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
                "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(int(self.max_timeout_ms / 1e3) + 30),
                # The program that starts all is not in a loop when it asks the ledger to drain.
                ROUTER_LOOP: "1",
                # A replica that goes answers what it has first, and HAProxy asks another where a
                # connection is refused: Ray's 30 s would only hold up every stop.
                "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
            }
        return wanted


class Canary(Settings):
    """A query whose best document was known when the index was built."""

    query: str
    doc_id: str
    score: float


@dataclass(frozen=True)
class ServedReranker:
    """A reranker and who it is."""

    start: str
    fingerprint: str

    @classmethod
    def read(cls, start: str) -> "ServedReranker":
        """Raises ValueError as `trained_directory`; each replica loads its own."""
        from bixse.models.encoder import encoder_fingerprint
        from bixse.models.reranker import trained_directory

        directory = trained_directory(start)
        fingerprint = encoder_fingerprint(directory)
        leave(directory.name)
        return cls(start, fingerprint)


@dataclass(frozen=True)
class ServedIndex:
    """What the manifest of an index says to those who serve it."""

    url: str
    fingerprint: str
    encoder: str
    dim: int
    shard_rows: dict[str, int]
    canary: Canary
    recall: float | None = None
    """recall@10 against exact search, as measured when the index was built."""
    lexical: bool = False
    """Whether its shards hold BM25 too: other modes than `dense` need it."""
    metadata: dict[str, Kind] = field(default_factory=dict)
    """Fields that filters may name, and what they hold."""

    @property
    def modes(self) -> list[Mode]:
        """How it can be searched."""
        return ["dense", "lexical", "hybrid"] if self.lexical else ["dense"]

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
            recall = None if extra.get("recall@10") is None else float(extra["recall@10"])
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
        lexical, kinds = bool(extra.get("lexical")), extra.get("metadata", {})
        return cls(url, artifact.fingerprint, encoder, dim, rows, canary, recall, lexical, kinds)

    def check_encoder(self, start: str, fingerprint: str) -> None:
        """Raises ValueError, naming both fingerprints, when another encoder made this index."""
        if fingerprint != self.encoder:
            raise ValueError(
                f"the index {self.url} was made by encoder {self.encoder}, but {start} is encoder "
                f"{fingerprint}: serve it with its own encoder, or index again"
            )

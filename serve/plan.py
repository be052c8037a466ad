"""What serving an index will take, from its manifest alone: nothing is loaded or started."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bixse.artifacts import Artifact
from bixse.retrieval.device import SCRATCH_BYTES
from bixse.retrieval.settings import ON_GPU
from bixse.retrieval.structures import CODED
from serve.settings import ServeArgs, ServedIndex

_REPLICA_BYTES = 400 << 20
"""Memory of a replica before it holds anything: Python, Ray, FAISS."""
_MODEL_BYTES = 700 << 20
"""Memory of a process that runs a model, without its weights: Python, torch, transformers, a
batch."""
_WORDS_FILE = "vocab.index.json"
_WORDS_FACTOR = 8
"""How many bytes a dict takes for each byte of the words that BM25 knows (8.3 of 200,000 words, 7.4
of a million): each generation has its own."""


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of replica."""

    name: str
    replicas: int
    cpus: int
    gpus: float
    bytes: int
    """Resident memory of one replica while one generation is served."""
    changing_bytes: int
    """While a new one of the same size is loaded beside it, and the one before is kept; while the
    codes of its shards are merged they take up to twice their memory."""
    mapped_bytes: int
    """Stored fields on disk, mapped: they come and go with the page cache."""
    gpu_bytes: int = 0
    """GPU memory, about, of the shards of three generations and of FAISS's scratch for each."""


@dataclass(frozen=True, slots=True)
class Plan:
    parts: tuple[Part, ...]
    documents: int
    search_ms: float | None
    """Median of one search of the slowest shard, as measured when the index was built."""
    search_per_s: float | None
    """Queries a second, about, that the shards could answer one after another on the cores asked
    for; None where no core searches or nothing was measured. Batches are faster, and encoding takes
    its own time: no manifest says how much."""
    losses: tuple[str, ...]
    """What the loss of one node costs, and what does not."""
    idle_gpus: str | None = None
    """Why `--shard-gpus` would do nothing."""


def plan(args: ServeArgs, encoder: Path, reranker: Path | None = None) -> Plan:
    """Raises ArtifactError when there is no index that can be served."""
    index = ServedIndex.read(args.index)
    manifest = Artifact.open(args.index, "index", verify=False).manifest
    files = {name: entry.bytes for name, entry in manifest.files.items()}
    weights, structure = _weights(encoder), manifest.extra.get("structure")
    searched = args.shard_gpus > 0 and structure in ON_GPU
    shards = {name: _Shard.of(name, files) for name in index.shard_rows}
    parts = _parts(args, weights, shards, searched, merged=structure in CODED and len(shards) > 1)
    if reranker is not None:
        # All generations' in one process; a change of the index alone loads none.
        read = _weights(reranker)
        held, changing = _MODEL_BYTES + read, _MODEL_BYTES + 3 * read
        cpus, gpus = args.reranker_cpus, args.reranker_gpus
        parts.append(Part("reranker", args.reranker_replicas, cpus, gpus, held, changing, 0))
    measured = manifest.extra.get("latency_ms")
    search_ms = measured if isinstance(measured, int | float) else None
    return Plan(
        parts=tuple(parts),
        documents=sum(index.shard_rows.values()),
        search_ms=search_ms,
        search_per_s=_search_per_s(args, search_ms, len(shards))
        if search_ms and not searched
        else None,
        losses=tuple(_losses(args, index)),
        idle_gpus=None
        if searched or not args.shard_gpus
        else f"--shard-gpus does nothing for {structure}: FAISS searches it on the CPU alone",
    )


def as_text(planned: Plan) -> str:
    """The plan for people."""
    lines = [f"{planned.documents} documents"]
    for part in planned.parts:
        changing = _gib(part.changing_bytes)
        lines.append(
            f"{part.replicas} x {part.name}: {part.cpus} CPU"
            + (f", {part.gpus:g} GPU" if part.gpus else "")
            + (f" ({_gib(part.gpu_bytes)} of it for shards)" if part.gpu_bytes else "")
            + f", {_gib(part.bytes)} resident, {changing} while a generation changes, "
            f"{_gib(part.mapped_bytes)} mapped"
        )
    total = sum(part.replicas * part.changing_bytes for part in planned.parts)
    lines.append(f"in all: {_gib(total)} while a generation changes")
    if planned.search_ms:
        rate = planned.search_per_s
        lines.append(
            f"search alone: {planned.search_ms:g} ms a shard on one core when the index was built"
            + (f", so about {rate:,.0f} queries/s, more in batches" if rate else "")
            + "; encoding comes on top, and no manifest says what it takes"
        )
    if planned.idle_gpus:
        lines.append(planned.idle_gpus)
    return "\n".join([*lines, *planned.losses])


def _search_per_s(args: ServeArgs, shard_ms: float, shards: int) -> float:
    """All shards at the pace of the slowest: side by side, or one after another in a replica."""
    if args.topology == "replicate":
        return args.replicas * args.shard_cpus * 1e3 / (shard_ms * shards)
    return args.replicas_per_shard * args.shard_cpus * 1e3 / shard_ms


class _Shard(NamedTuple):
    """Bytes of one shard."""

    vectors: int
    words: int
    """As a dict in memory."""
    mapped: int

    @classmethod
    def of(cls, name: str, files: dict[str, int]) -> "_Shard":
        own = {file: size for file, size in files.items() if file.startswith(f"{name}/")}
        vectors = sum(size for file, size in own.items() if file.endswith(".faiss"))
        words = sum(size for file, size in own.items() if file.endswith(f"/{_WORDS_FILE}"))
        return cls(vectors, words * _WORDS_FACTOR, sum(own.values()) - vectors - words)


def _parts(
    args: ServeArgs, weights: int, shards: dict[str, _Shard], searched: bool, merged: bool
) -> list[Part]:
    vectors = sum(shard.vectors for shard in shards.values())
    words = sum(shard.words for shard in shards.values())
    stored = sum(shard.mapped for shard in shards.values())
    encoder = _MODEL_BYTES + weights
    if args.topology == "replicate":
        cpus, gpus = args.encoder_cpus + args.shard_cpus, args.encoder_gpus + args.shard_gpus
        one, on_gpu = encoder + vectors + words, vectors if searched else None
        moved = vectors if merged else 0
        return [_part("replica", args.replicas, cpus, gpus, one, stored, on_gpu, moved)]
    return [
        _part("gateway", 1, 1, 0, 0, 0),
        _part("encoder", args.encoder_replicas, args.encoder_cpus, args.encoder_gpus, encoder, 0),
        *(
            _part(
                name,
                args.replicas_per_shard,
                args.shard_cpus,
                args.shard_gpus,
                shard.vectors + shard.words,
                shard.mapped,
                shard.vectors if searched else None,
            )
            for name, shard in shards.items()
        ),
    ]


def _part(
    name: str,
    replicas: int,
    cpus: int,
    gpus: float,
    held: int,
    mapped: int,
    on_gpu: int | None = None,
    moved: int = 0,
) -> Part:
    # Current, previous and candidate; Python, Ray and FAISS once.
    resident, changing = _REPLICA_BYTES + held, _REPLICA_BYTES + 3 * held + moved
    copied = 0 if on_gpu is None else 3 * (SCRATCH_BYTES + on_gpu)
    return Part(name, replicas, cpus, gpus, resident, changing, mapped, copied)


def _weights(model: Path) -> int:
    """Bytes of the weights; of a module saved both ways those that are loaded, safetensors."""
    size_of: dict[Path, dict[str, int]] = {}
    for path in (*model.rglob("*.safetensors"), *model.rglob("pytorch_model*.bin")):
        sizes = size_of.setdefault(path.parent, {})
        sizes[path.suffix] = sizes.get(path.suffix, 0) + path.stat().st_size
    return sum(sizes.get(".safetensors", sizes.get(".bin", 0)) for sizes in size_of.values())


def _losses(args: ServeArgs, index: ServedIndex) -> list[str]:
    losses = _losses_of_the_first_stage(args, index)
    if args.reranker is not None and args.reranker_replicas == 1:
        losses.append(
            "losing the reranker's node: hits as they were found until it has loaded elsewhere; "
            "answers say so, or are refused with allow_partial=false"
        )
    return losses


def _losses_of_the_first_stage(args: ServeArgs, index: ServedIndex) -> list[str]:
    if args.topology == "replicate":
        if args.replicas == 1:
            return ["losing its node: nothing answers until the replica has loaded elsewhere"]
        left = (args.replicas - 1) / args.replicas
        return [f"losing a node with one replica: full coverage, {left:.0%} of the rate"]
    losses = ["losing the gateway's node: nothing answers until it has started elsewhere"]
    if args.encoder_replicas == 1:
        losses.append("losing the encoder's node: 503 until it has loaded elsewhere")
    total = sum(index.shard_rows.values())
    most = max(index.shard_rows.values()) / total
    if args.replicas_per_shard == 1:
        losses.append(
            f"losing a shard's node: coverage falls by up to {most:.0%} until it has loaded "
            "elsewhere; answers say so, or are refused with allow_partial=false"
        )
    else:
        losses.append(
            "losing a shard's node: full coverage, if Ray put its replicas on different nodes"
        )
    return losses


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"

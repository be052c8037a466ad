"""Links -> node vectors -> neighbour lists: what SciNCL's bands (`bixse.candidates.bands`) are cut
from.

The paper embeds its graph of 52 million nodes by PyTorch-BigGraph; ours are FastRP's vectors (Chen
et al., CIKM 2019, arXiv 1908.11512): random vectors, averaged over walks of a few lengths. They
take no training, one sparse product a step of the walk, and are a function of links and seed.

Shapes: N nodes, E dimensions, B nodes of a block.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

BLOCK_ROWS = 1024
"""Nodes whose lists are made together: memory is that many rows of similarity to all nodes."""


def linked(links: Sequence[tuple[str, str]]) -> list[str]:
    """The nodes that some other node is linked with, sorted: an isolated one has no neighbours."""
    return sorted({node for a, b in links if a != b for node in (a, b)})


def node_vectors(
    links: Sequence[tuple[str, str]],
    nodes: Sequence[str],
    dimensions: int,
    walk: Sequence[float],
    seed: int,
) -> Floats:
    """Unit vectors [N, E] of `nodes`; `walk[k]` weighs where walks of k + 1 steps end.

        sum_k walk[k] * unit rows of (D^-1 A)^(k+1) R

    with A the number of links between two nodes in either direction, D its row sums, and R normal.
    Links of a node with itself count for nothing. Raises ValueError when a node has no link with
    another, and KeyError for a link of a node that is not among them.
    """
    number = {node: row for row, node in enumerate(nodes)}
    ends = np.asarray([(number[a], number[b]) for a, b in links if a != b], np.int64).reshape(-1, 2)
    rows, columns = np.concatenate([ends, ends[:, ::-1]]).T
    ones = np.ones(len(rows), np.float64)
    adjacency = sparse.csr_matrix((ones, (rows, columns)), shape=(len(nodes), len(nodes)))
    degree_N = np.asarray(adjacency.sum(axis=1)).ravel()
    if not degree_N.all():
        alone = nodes[int(degree_N.argmin())]
        raise ValueError(f"node {alone!r} has no link with another: its place in the graph is none")
    step = sparse.diags(1 / degree_N) @ adjacency
    reached_NE = np.random.default_rng(seed).normal(size=(len(nodes), dimensions))
    found_NE = np.zeros_like(reached_NE)
    for weight in walk:
        reached_NE = step @ reached_NE
        found_NE += weight * _unit(reached_NE)
    return _unit(found_NE).astype(np.float32)


def neighbour_lists(vector_NE: Floats, reach: int) -> Iterator[Ints]:
    """Of each node the rows of its `reach` nearest by cosine, nearest first, itself left out.

    Exact; equal cosines stand in the order of the rows. Fewer where there are fewer.
    """
    reach = min(reach, len(vector_NE) - 1)
    for start in range(0, len(vector_NE), BLOCK_ROWS):
        cosine_BN = vector_NE[start : start + BLOCK_ROWS] @ vector_NE.T
        own_B = np.arange(len(cosine_BN))
        cosine_BN[own_B, start + own_B] = -np.inf
        yield from np.argsort(-cosine_BN, axis=1, kind="stable")[:, :reach].astype(np.int64)


def _unit(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    unit: npt.NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit

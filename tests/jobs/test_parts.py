"""Units of work: what is read for them, and what becomes of those that lose a row."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bixse.place import Place
from bixse.records import CORPUS, Rejection
from jobs.parts import row_units, run_units
from tests.artifacts import artifact, drafted

ROOT = Path(__file__).resolve().parents[2]


def test_units_together_read_a_part_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(1)
    texts = [draw.randbytes(300).hex() for _ in range(8000)]
    columns = {"doc_id": [f"d{n}" for n in range(8000)], "title": [""] * 8000, "text": texts}
    draft = drafted(tmp_path / "corpus", "corpus")
    draft.write_part(0, pa.table(columns, schema=CORPUS))
    made = draft.finish()
    units, read, opened = row_units(made, 512), [0], Place.open

    def counting(place: Place, name: str) -> Any:
        handle: Any = opened(place, name)
        taken = handle.read

        def counted(size: int = -1) -> bytes:
            data: bytes = taken(size)
            read[0] += len(data)
            return data

        handle.read = counted
        return handle

    monkeypatch.setattr(Place, "open", counting)
    tables = [unit.read() for unit in units]
    assert pa.concat_tables(tables).equals(made.table())
    # Two units meet in a row group, and each reads what the file says of itself.
    read[0] = 0
    for unit in units:
        unit.read()
    assert read[0] < 3 * made.manifest.files["part-00000.parquet"].bytes


class LosesOne:
    """Work that forgets a row."""

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        return rows.slice(1), []


def test_a_part_that_lost_a_row_does_not_stand_for_its_unit(tmp_path: Path) -> None:
    """The run that made it failed, and the next took it for done: the row was gone in silence."""
    columns = {"doc_id": ["a", "b"], "title": ["", ""], "text": ["x", "y"]}
    draft = drafted(tmp_path / "corpus", "corpus")
    draft.write_part(0, pa.table(columns, schema=CORPUS))
    units = row_units(draft.finish(), 2)
    for _ in range(2):
        out = drafted(tmp_path / "out", "corpus")
        with pytest.raises(RuntimeError, match="part 0 got 2 rows, made 1 and rejected 0"):
            run_units(out, units, LosesOne, (), label="x", actors=1, cpus=1, gpus=0)
        assert out.parts_done() == set()


class Breaks:
    """Work with a bug, or whose engine has no room or no kernel."""

    def __init__(self, at_once: bool) -> None:
        if at_once:
            self(pa.table({}))

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[Rejection]]:
        raise RuntimeError("no room for the batch")


@pytest.mark.parametrize("at_once", [True, False])
def test_what_work_failed_of_is_said(
    at_once: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ray Data says that a function failed, and neither where nor of what."""
    row = {"doc_id": "d", "title": "", "text": "x"}
    units = row_units(artifact(tmp_path / "texts", "corpus", [row], CORPUS), 1)
    out = drafted(tmp_path / "out", "corpus")
    with pytest.raises(RuntimeError, match=r"^t failed: RuntimeError: no room for the batch$"):
        run_units(out, units, Breaks, (at_once,), label="t", actors=1, cpus=1, gpus=0)
    assert "test_parts.py" in capfd.readouterr().err
    assert out.parts_done() == set()


def test_work_that_a_machine_has_no_room_for_is_refused(tmp_path: Path) -> None:
    row = {"doc_id": "d", "title": "", "text": "x"}
    units = row_units(artifact(tmp_path / "texts", "corpus", [row], CORPUS), 1)
    made = drafted(tmp_path / "made", "corpus")
    with pytest.raises(ValueError, match=r"asks for 1000 GPUs and this machine has \d+: lower"):
        run_units(made, units, LosesOne, (), label="t", actors=1, cpus=1, gpus=1000)


_ON_THREE_NODES = """
import ray
from ray.cluster_utils import Cluster
from jobs.following import Count
from jobs.cluster import beside_driver
nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
for _ in range(2):
    nodes.add_node(num_cpus=1)
ray.init(address=nodes.address, log_to_driver=False)
node = ray.get_runtime_context().get_node_id
counts = [beside_driver(Count) for _ in range(8)]
where = lambda _: ray.get_runtime_context().get_node_id()
print({ray.get(count.__ray_call__.remote(where)) for count in counts} == {node()})
"""


def test_what_a_run_is_steered_by_stays_with_its_driver() -> None:
    line = [sys.executable, "-c", _ON_THREE_NODES]
    run = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True, timeout=240)
    assert run.stdout.splitlines()[-1] == "True"

"""The cores of a node that has GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cluster import start_ray

ROOT = Path(__file__).resolve().parent.parent.parent

WITH_GPUS = """
import json, os, sys
import ray
from transformers import AutoTokenizer
from bixse.models.encoder import resolve
from bixse.models.settings import PACKAGED
from jobs.cluster import tokenise_on_cores

# Nobody asks whether the GPUs are there.
env = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.getcwd()}
ray.init("local", num_cpus=12, num_gpus=2, include_dashboard=False, runtime_env={"env_vars": env})

@ray.remote(max_calls=1)
def threads():
    tokenise_on_cores()
    tokenizer = AutoTokenizer.from_pretrained(str(resolve(PACKAGED)))._tokenizer
    before = len(os.listdir("/proc/self/task"))
    tokenizer.encode_batch(["a text of some words"] * 1000)
    return len(os.listdir("/proc/self/task")) - before

print(json.dumps([ray.get(threads.options(num_gpus=gpus).remote()) for gpus in (0, 0.5, 1)]))
"""


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(),
    reason="/proc, where Linux lists a process's threads, is not there",
)
def test_the_cores_beside_a_gpu_tokenise() -> None:
    """One core tokenised what a GPU was to encode, and the others did nothing."""
    line = [sys.executable, "-c", WITH_GPUS]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 3, 6]


def test_a_ray_that_does_not_answer_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises a bare Exception of its own node, and that was a traceback of a job."""

    def init(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    # Which machine makes Ray late cannot be arranged: what it raises then is all that is replaced.
    # The variable may be unset, and another test of this process may have a Ray.
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(ConnectionError, match=r"^no Ray on this machine: The current node timed"):
        start_ray()

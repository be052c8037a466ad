"""An encoder in a process of its own: the same vectors, and what happens when it dies."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from bixse.models.encoder import Encoder
from serve.encoder_process import EncoderProcess, encode_now
from serve.messages import NotHeld
from tests.encoders import save_tiny_encoder, texts

ROOT = Path(__file__).resolve().parents[2]
SOME = texts(20, seed=1)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("started"), {"query": "ask:"})


@pytest.fixture(scope="module")
def process(start: Path) -> Iterator[EncoderProcess]:
    process = EncoderProcess(str(start), threads=1)
    yield process
    process.close()


def test_vectors_do_not_depend_on_the_company(encoder):
    texts = ["an otter", "the heron feeds " * 60, "a toad", "x", "moths " * 30]
    batch = encode_now(encoder, texts, "query")
    alone = np.concatenate([encoder.encode([text], "query") for text in texts])
    assert np.allclose(batch.vectors, alone, atol=1e-6)
    assert batch.tokens == [encode_now(encoder, [text], "query").tokens[0] for text in texts]
    assert batch.refused == {}


def test_vectors_are_those_of_the_encoder_here(process, start):
    here = Encoder.load(str(start))
    assert process.fingerprint == here.fingerprint
    queries = process.encode(SOME, "query")
    assert np.allclose(queries.vectors, here.encode(SOME, "query"), atol=1e-6)
    assert not np.allclose(queries.vectors, process.encode(SOME, "document").vectors, atol=1e-2)
    assert process.encode(["", "half \ud800 of a pair"], "query").refused.keys() == {1}


@pytest.mark.slow
def test_it_dies_under_a_batch_and_the_next_is_answered(process, start):
    before = process.encode(SOME, "query").vectors
    before_it_died = process.process_id
    psutil.Process(before_it_died).suspend()
    threading.Timer(0.3, os.kill, (before_it_died, signal.SIGKILL)).start()
    with pytest.raises(NotHeld, match="died, with -9"):
        process.encode(SOME, "query")
    assert np.array_equal(process.encode(SOME, "query").vectors, before)
    assert process.process_id != before_it_died

    # It may not come back as another: its vectors would not be those of the index.
    os.kill(process.process_id, signal.SIGKILL)
    os.waitid(os.P_PID, process.process_id, os.WEXITED | os.WNOWAIT)
    settings, moved = start / "sentence_bert_config.json", start / "aside"
    settings.rename(moved)
    try:
        with pytest.raises(NotHeld, match=r"is encoder \w+ by now"):
            process.encode(SOME, "query")
    finally:
        moved.rename(settings)
    assert np.array_equal(process.encode(SOME, "query").vectors, before)


def test_it_ends_with_the_one_that_started_it(start):
    program = (
        "import sys, time; from serve.encoder_process import EncoderProcess;"
        "held = EncoderProcess(sys.argv[1], 1);"
        "print(held.process_id, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(start)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        encoder = psutil.Process(int(parent.stdout.readline()))
        time.sleep(1)
        assert encoder.status() != psutil.STATUS_ZOMBIE
        parent.kill()
    encoder.wait(20)

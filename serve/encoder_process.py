"""An encoder in a process of its own.

A model's call is hundreds of operations, and each gives up the interpreter's lock and takes it
again. In a process whose event loop answers requests a batch of 16 waited for it for 26 of 85 ms.
Here it waits for nobody, and a model that crashes takes no shard and no other request along.

Texts go in and vectors come out over a socket. When it closes the process ends: with the one that
started it, however that ended.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from bixse.models.encoder import Encoder, Role
from bixse.settings import Precision
from serve.messages import EncodedBatch, NotHeld

if TYPE_CHECKING:
    AnyConnection = Connection[Any, Any]

_ENDS_WITHIN_S = 10.0


class EncoderProcess:
    """A loaded encoder, for one thread at a time.

    It is started again, with what then stands at `start`, when it has died.
    """

    def __init__(self, start: str, threads: int, queries: Precision = "float32") -> None:
        """`queries`: as in `Encoder.load`. Raises as that, and RuntimeError when it dies of it."""
        self._asked = (start, threads, queries)
        self._process, self._socket, self.fingerprint = _started(self._asked)

    @property
    def process_id(self) -> int:
        return self._process.pid

    def encode(self, texts: Sequence[str], role: Role) -> EncodedBatch:
        """Encode a batch; a text that cannot be encoded is refused alone.

        Raises NotHeld when the process dies of it, or another encoder stands there since it died.
        """
        if self._process.poll() is not None:
            self._start_again()
        try:
            self._socket.send((list(texts), role))
            batch: EncodedBatch = _received(self._socket)
        except (EOFError, OSError) as error:
            raise NotHeld(f"the encoder's process died, with {self._process.wait()}") from error
        return batch

    def _start_again(self) -> None:
        self._socket.close()
        try:
            process, socket, fingerprint = _started(self._asked)
        except (ValueError, RuntimeError) as error:
            raise NotHeld(f"the encoder cannot be loaded again: {error}") from error
        if fingerprint != self.fingerprint:
            _end(process, socket)
            raise NotHeld(f"{self._asked[0]} is encoder {fingerprint} by now")
        self._process, self._socket = process, socket

    def close(self) -> None:
        """End the process."""
        _end(self._process, self._socket)


def _started(
    asked: tuple[str, int, Precision],
) -> tuple["subprocess.Popen[bytes]", "AnyConnection", str]:
    ours, theirs = Pipe()
    with theirs:
        # Not `multiprocessing`: it runs the main program of a Ray worker again.
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # What Ray has put on this process' path, its working directory among it.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        )
    try:
        ours.send(asked)
        fingerprint: str = _received(ours)
    except (EOFError, OSError) as error:
        ours.close()
        code = process.wait()
        raise RuntimeError(f"the encoder's process died while it loaded, with {code}") from error
    except BaseException:
        _end(process, ours)
        raise
    return process, ours, fingerprint


def _received(socket: "AnyConnection") -> Any:
    answer = socket.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _end(process: "subprocess.Popen[bytes]", socket: "AnyConnection") -> None:
    socket.close()
    try:
        process.wait(_ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def encode_now(encoder: Encoder, texts: Sequence[str], role: Role) -> EncodedBatch:
    """Encode in this process. A batch that fails is halved until the guilty are alone."""
    try:
        return EncodedBatch(encoder.encode(texts, role), _count_tokens(encoder, texts, role))
    except (ValueError, TypeError, IndexError) as error:
        if len(texts) == 1:
            void_1D = np.zeros((1, encoder.dim), np.float32)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return EncodedBatch(void_1D, [0], {0: reason})
    half = len(texts) // 2
    left, right = encode_now(encoder, texts[:half], role), encode_now(encoder, texts[half:], role)
    return EncodedBatch(
        np.concatenate([left.vectors, right.vectors]),
        left.tokens + right.tokens,
        {**left.refused, **{half + i: reason for i, reason in right.refused.items()}},
    )


def _count_tokens(encoder: Encoder, texts: Sequence[str], role: Role) -> list[int]:
    """Tokens that the model reads of each text, after truncation, without its prompt."""
    from bixse.reading.ragged import Ragged
    from bixse.reading.tokenising import tokenised

    model = encoder.model
    read = tokenised(model, texts, role, prompt=None, max_tokens=None)
    if isinstance(read, Ragged):
        return [int(length) for length in read.length_N]
    ids = model.tokenizer(list(texts), truncation=True, max_length=model.max_seq_length)
    return [len(row) for row in ids["input_ids"]]


def _serve(socket: "AnyConnection") -> None:
    """Load what is asked for and encode until nobody asks."""
    import torch

    start, threads, queries = socket.recv()
    torch.set_num_threads(threads)
    try:
        encoder = Encoder.load(start, queries=queries)
    except ValueError as error:
        socket.send(error)
        return
    socket.send(encoder.fingerprint)
    while True:
        texts, role = socket.recv()
        try:
            socket.send(encode_now(encoder, texts, role))
        except RuntimeError as error:
            # Torch's, out of memory among them: this batch's own. Plain, since those of libraries
            # may not be made again from their text; what is none of these ends the process.
            socket.send(RuntimeError(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    # A terminal sends it to all that it started; this one ends when its socket does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Connection(int(sys.argv[1])) as socket:
            _serve(socket)
    except (EOFError, ConnectionError):
        pass

"""An encoder of random weights learns from next tokens alone which texts are of one topic.

A topic is a set of half of all words and what may follow each of them (three others): every word is
of several topics, so that a random encoder tells them apart a little, and badly.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from bixse.models.encoder import load_model
from bixse.place import Place
from bixse.training.gated import ChunkGroups, GatedRun, choices, gated_loop
from bixse.training.gather import World
from bixse.training.settings import Gated
from tests.encoders import WORDS, save_tiny_encoder

TOPICS, VOCABULARY, LENGTH, GROUP = 8, 32, 12, 8
SETTINGS = Gated(
    batch_size=8, temperature=0.05, learning_rate=2e-3, checkpoint_every=1000, precision="float32"
)
STEPS = 150


class Language:
    """Chunks of each topic, drawn anew whenever one is asked for."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        of_topic = [self.draw.choice(VOCABULARY, VOCABULARY // 2, False) for _ in range(TOPICS)]
        self.words = np.array(of_topic)
        self.next = np.array(
            [[self.draw.choice(words, 3, False) for _ in range(VOCABULARY)] for words in of_topic]
        )

    def chunk(self, topic: int) -> list[int]:
        made = [int(self.draw.choice(self.words[topic]))]
        while len(made) < LENGTH:
            made.append(int(self.draw.choice(self.next[topic, made[-1]])))
        return made

    def groups(self, count: int) -> tuple[ChunkGroups, np.ndarray]:
        """Groups of two chunks of each of four topics, and the topics."""
        topics = [self.draw.choice(TOPICS, GROUP // 2, False).repeat(2) for _ in range(count)]
        chunks = [self.chunk(topic) for topic in np.concatenate(topics)]
        made = ChunkGroups(
            pa.array([spelt(chunk) for chunk in chunks], pa.large_string()),
            np.array([len(spelt(chunk[: LENGTH // 2])) for chunk in chunks]),
            np.concatenate(chunks).astype(np.int32),
            np.arange(len(chunks) + 1) * LENGTH,
            np.arange(count + 1) * GROUP,
        )
        return made, np.array(topics)


def spelt(words: list[int]) -> str:
    return " ".join(WORDS[word] for word in words)


@torch.no_grad()
def contrast(encoder: Any, language: Language) -> float:
    """Mean weight between chunks of one topic over that between chunks of two."""
    groups, topics = language.groups(40)
    same, other = [], []
    for number, topic_C in enumerate(torch.from_numpy(topics)):
        weight_CC = choices(encoder, groups.group(number), SETTINGS)
        alike_CC = topic_C[:, None] == topic_C
        same.append(weight_CC[alike_CC & ~torch.eye(GROUP, dtype=torch.bool)].mean())
        other.append(weight_CC[~alike_CC].mean())
    return float(torch.stack(same).mean() / torch.stack(other).mean())


def recall(encoder: Any, language: Language) -> float:
    """How often the second half of a document is nearest to its first, of one of each topic."""
    hits = []
    for _ in range(40):
        chunks = [language.chunk(topic) for topic in range(TOPICS)]
        asked = encoder.encode_query([spelt(chunk[: LENGTH // 2]) for chunk in chunks])
        told = encoder.encode_document([spelt(chunk[LENGTH // 2 :]) for chunk in chunks])
        hits.append((asked @ told.T).argmax(1) == np.arange(TOPICS))
    return float(np.mean(hits))


@pytest.mark.slow
def test_the_encoder_learns_topics_from_next_tokens(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=LENGTH, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    language_model = GPT2LMHeadModel(config)
    encoder = load_model(str(save_tiny_encoder(tmp_path)), "cpu").eval()
    language = Language(seed=0)
    groups, _ = language.groups(STEPS * SETTINGS.batch_size)
    assert contrast(encoder, language) < 3
    assert recall(encoder, language) < 5 / TOPICS
    run = GatedRun(SETTINGS, groups, Place(str(tmp_path / "checkpoints")), "toy")
    gated_loop(run, encoder, language_model, World())
    assert contrast(encoder, language) > 10
    assert recall(encoder, language) >= 5 / TOPICS

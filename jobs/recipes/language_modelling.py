"""An encoder that learns from raw text, as far as what it chooses helps a language model."""

from bixse.training.settings import Gated
from jobs.recipe import About, Recipe


def revela() -> Recipe:
    """Revela, arXiv 2506.16552: next tokens, predicted from the chunks that the encoder chooses.

    Needs a corpus, and a causal language model (--gated.language-model). Differs from the paper:
    encoder and language model are any two models, and by default all of their weights are trained,
    at a lower rate; the paper's are adapters on one kind of model, `--gated.lora-rank 256
    --gated.learning-rate 1e-4`, there with dropout of .1 and here without any. The encoder's
    prompts and pooling are its own, its temperature is higher than the paper's 1e-4, which is for
    the cosines of an encoder that has learnt nothing yet. Chunks of a document are of nearly equal
    length, and the loss is a mean over tokens, not over groups.
    """
    return Recipe(
        name="revela",
        about=About(
            paper="Revela, arXiv 2506.16552",
            hardware="1+ GPU",
            cost="training of a language model on the corpus, read twice a step; no label is paid",
        ),
        gated=Gated(),
    )

"""The data of the quickstart: the documentation of the running Python, and questions about it.

`queries.jsonl` and `qrels.tsv` (BEIR's layout, all of them the test split) are 119 questions
written one by one, in the words of someone who does not know the name of the answer. One assessor,
the language model that wrote this recipe, graded the documents that answer each, wherever they
stood, and from its title and opening lines every document among the best ten of BM25 and of
all-MiniLM-L6-v2. The steps are UMBRELA's: 3 dedicated and exact, 2 a partial or buried answer,
1 related, 0 not. So nothing that either of the two returns in its first ten is unjudged. Grades
were given on Python 3.11; another version lacks a few of the documents.

Training never sees them: its queries are cut out of the documents (`bixse.synthesis.queries`).
"""

from pathlib import Path

from jobs.recipes.python_docs.reader import documents

__all__ = ["documents", "evaluation_files"]


def evaluation_files() -> tuple[str, str]:
    """Paths of the questions and of their grades."""
    here = Path(__file__).parent
    return str(here / "queries.jsonl"), str(here / "qrels.tsv")

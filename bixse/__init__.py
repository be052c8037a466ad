"""bixse: from a corpus to a served dense retriever, supervised by graded relevance.

    corpus -> synthesise -> pair -> judge -> train -> evaluate -> embed -> index -> serve

This package is the vocabulary and the mathematics: what a document, a pair, a judgment and a
finished artefact are (`records`, `scale`, `artifacts`), and one sub-package a stage. It imports
neither Ray nor vLLM: `jobs/` are the verbs that carry these functions over a cluster, `serve/` is
the HTTP shell. The command line is `python -m jobs.<verb> <recipe> --out DIR`, see `jobs.command`.
"""

__version__ = "0.1.0"

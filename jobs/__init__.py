"""The verbs: one a file, `python -m jobs.<verb> <recipe> --out DIR`; `pipeline` is their order."""

"""The data of the quickstart: the documentation of the running Python, and questions about it."""

"""Names of encoders."""

PACKAGED = "packaged:all-MiniLM-L6-v2"
"""The encoder that a registry package carries, for machines that reach no model hub."""

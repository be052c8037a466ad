"""Vectors or words in, rankings out."""

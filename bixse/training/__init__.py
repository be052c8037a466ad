"""Judgments in, gradients out."""

"""Texts as a model reads them: tokenised, padded little or not at all, in chunks that fit."""

"""Recipes, one published system a file; `jobs.command` has their names."""

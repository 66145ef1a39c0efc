"""Mutation tests of the modules that decide numbers: ``make mutants``, described in docs/quality.md."""

"""Evaluation: scores of reconstructions, tables and figures."""

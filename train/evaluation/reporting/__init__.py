"""Figures, tables and pages of an evaluation and of an audit."""

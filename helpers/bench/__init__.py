"""Timing backends against each other: the run, its records, tables and claims."""

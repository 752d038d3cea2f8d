"""Benchmark suites: their tables, reading, marking and pages."""

"""Several models on the same rows, with tests of their differences."""

"""What every room may use: files written whole, journals, processes, intervals, pages. Imports `errors` alone."""

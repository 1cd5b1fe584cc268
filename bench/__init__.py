"""The microbenchmark suite's package; for now the table of cases that tests and benchmarks share."""

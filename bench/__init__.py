"""The microbenchmark suite; for now the table of cases that tests and benchmarks share."""

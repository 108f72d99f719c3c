"""One script per claim; results lie in benchmarks/results as JSON, and README's tables are made of them."""

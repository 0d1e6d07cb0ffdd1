"""Plans a run in integers: buckets, pages, cost and memory. Imports no torch."""

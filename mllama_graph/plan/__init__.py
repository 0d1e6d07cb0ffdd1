"""What a run will do, in integers: buckets, pages, cost, memory. Imports no torch."""

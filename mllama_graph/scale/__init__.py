"""More than one engine: offline batches on Ray Data, and replicas on Ray Serve."""

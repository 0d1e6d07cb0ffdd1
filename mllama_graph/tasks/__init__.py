"""What a run does, by task=: each module has one `main(run)`."""

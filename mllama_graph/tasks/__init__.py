"""The tasks that task= selects. Each task's module has a function `main(run)`."""

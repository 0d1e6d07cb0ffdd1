"""What a run can do: one module a task, each with `main(run) -> None`, named by conf/task/."""

"""Tasks: Harbor directories, and the generators of the quickstart's terminal and software tasks."""

from north_lightning.tasks.harbor import (
    TaskSource,
    image_of,
    load_task,
    load_task_sets,
    load_tasks,
    solution_steps,
    write_task,
)

__all__ = ["TaskSource", "image_of", "load_task", "load_task_sets", "load_tasks", "solution_steps", "write_task"]

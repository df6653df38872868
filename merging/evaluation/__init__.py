"""Judging models: tasks, scorers for each kind of task, a record per item, and honest statistics from records alone."""

"""Judging models: tasks with exact answers, greedy generation, records per item and honest intervals."""

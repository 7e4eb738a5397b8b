"""Batch jobs: conversations in a file, answers in a file."""

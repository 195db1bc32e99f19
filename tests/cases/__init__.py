"""A test for each situation that people met, named by what they did; docs/operations.md has the table of their docstrings."""

"""The sweep: every combination of scoring, grouping, scaling and K, from one set of statistics, evaluated in memory (surgery + evals)."""

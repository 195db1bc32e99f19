"""Figures from the files of the stages: metrics, rankings, plans, records, statistics. Matplotlib without a display."""

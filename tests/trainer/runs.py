"""What the tests of interrupted runs share."""

from __future__ import annotations

# Columns of metrics.jsonl that come from a clock, or from how much memory the process happened to take.
TIMED = {"step_seconds", "data_seconds", "collective_seconds", "tokens_per_second", "flops_per_second", "mfu", "peak_memory_bytes"}

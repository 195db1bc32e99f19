"""How fast D-optimal selection is beside its definition, a slogdet per candidate: prints `name value unit goal`."""

from __future__ import annotations

import time

import numpy as np

from megatron_moe2dense.surgery.scoring import greedy_log_det

EXPERTS, KEEP, TOKENS = 256, 128, 512
SECONDS, RATIO = 0.1, 100.0  # goals: the most the greedy Cholesky may take, the least it must win by
REPEATS = 5


def by_log_determinants(m_EE: np.ndarray, keep: int) -> list[int]:
    """Greedy selection with a fresh slogdet for every candidate of every step."""
    ridge = np.trace(m_EE) / len(m_EE) / keep
    chosen: list[int] = []
    for _ in range(keep):
        rest = [e for e in range(len(m_EE)) if e not in chosen]
        sets = np.array([[*chosen, e] for e in rest])
        gains = np.linalg.slogdet(m_EE[sets[:, :, None], sets[:, None, :]] + ridge * np.eye(len(chosen) + 1))[1]
        chosen.append(rest[int(np.argmax(gains))])
    return chosen


def main() -> None:
    """Time both on one weighted gram of 256 experts, 128 kept, and compare what they keep."""
    rng = np.random.default_rng(0)
    f_ET = rng.normal(size=(EXPERTS, TOKENS)) + rng.normal(size=TOKENS)
    weight_E = rng.random(EXPERTS)
    m_EE = np.sqrt(np.outer(weight_E, weight_E)) * (f_ET @ f_ET.T) / TOKENS
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        fast = greedy_log_det(m_EE, KEEP).tolist()
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    slow = by_log_determinants(m_EE, KEEP)
    elapsed = time.perf_counter() - start
    assert fast == slow, "greedy Cholesky and log determinants keep the same experts"
    print(f"d_optimal_cholesky {min(seconds):.4f} s {SECONDS}")
    print(f"d_optimal_slogdet {elapsed:.2f} s -")
    print(f"d_optimal_ratio {elapsed / min(seconds):.0f} x {RATIO:.0f}")


if __name__ == "__main__":
    main()

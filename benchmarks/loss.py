"""Forward KL at Qwen3's vocabulary: memory and time of the chunked loss over plain full-logits KL, same run. `name value unit goal`.

Each side runs in a process of its own, forward and backward from hidden states to gradients of hidden states and student head; the
memory is the growth of peak resident memory over the inputs. At few tokens a fused kernel may lose: there is one chunk then, and the
last line shows that it needs no second path. MOE2DENSE_BENCH_TOKENS shrinks the first size.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time

import torch

VOCAB, HIDDEN, ROUNDS, FEW = 151_936, 1024, 2, 128
TOKENS = int(os.environ.get("MOE2DENSE_BENCH_TOKENS", "4096"))


def plain(student: tuple[torch.Tensor, torch.Tensor], teacher: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The usual way: logits, log-softmax, kl_div."""
    with torch.no_grad():
        target = (teacher[0] @ teacher[1].t()).float().log_softmax(-1)
    found = (student[0] @ student[1].t()).float().log_softmax(-1)
    torch.nn.functional.kl_div(found, target, log_target=True, reduction="batchmean").backward()


def ours(student: tuple[torch.Tensor, torch.Tensor], teacher: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The trainer's loss."""
    from megatron_moe2dense.trainer.losses import losses
    from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits

    shards = [VocabParallelLogits.of(hidden, head, VOCAB, None) for hidden, head in (student, teacher)]
    tokens = len(student[0])
    mask = torch.ones(tokens)
    loss = losses["forward_kl"]().per_token(shards[0], shards[1], torch.zeros(tokens, dtype=torch.long), mask)
    ((loss * mask).sum() / tokens).backward()


def peak() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(side: str, tokens: int) -> None:
    """Print peak bytes over the inputs, and the shortest time of a round, as JSON."""
    torch.manual_seed(0)
    step = {"plain": plain, "ours": ours}[side]
    student, teacher = ((torch.randn(tokens, HIDDEN), torch.randn(VOCAB, HIDDEN) / 32) for _ in range(2))
    for tensor in student:
        tensor.requires_grad_(True)
    before, times = peak(), []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        step(student, teacher)
        times.append(time.perf_counter() - started)
        for tensor in student:
            tensor.grad = None
    print(json.dumps({"bytes": peak() - before, "seconds": min(times)}))


def ratios(tokens: int) -> tuple[float, float]:
    """Memory and time, ours over plain, one after the other."""
    sides = {}
    for side in ("plain", "ours"):
        done = subprocess.run([sys.executable, __file__, side, str(tokens)], capture_output=True, text=True, check=True)
        sides[side] = json.loads(done.stdout.splitlines()[-1])
    return tuple(sides["ours"][what] / sides["plain"][what] for what in ("bytes", "seconds"))  # type: ignore[return-value]


def main() -> None:
    """Print the ratios."""
    memory, seconds = ratios(TOKENS)
    print(f"loss_memory_over_full_logits {memory:.3f} ratio <=0.125")
    print(f"loss_time_over_full_logits {seconds:.2f} ratio <=1.3")
    print(f"loss_time_over_full_logits_{FEW}_tokens {ratios(FEW)[1]:.2f} ratio <=1.3")


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()

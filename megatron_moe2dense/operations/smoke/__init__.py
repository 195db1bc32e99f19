"""The first five minutes on a GPU machine (launch/gpu_smoke.sh): parity of kernels, a short distillation in each layout, a verdict."""

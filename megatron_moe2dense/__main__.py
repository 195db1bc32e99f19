"""`python -m megatron_moe2dense COMMAND ...`: the same commands as `moe2dense`, so that torchrun can start them."""

from megatron_moe2dense.cli import main

if __name__ == "__main__":
    main()

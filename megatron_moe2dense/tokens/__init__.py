"""Token streams: text to Megatron `.bin/.idx` files and back to windows of tokens. No torch, no megatron."""

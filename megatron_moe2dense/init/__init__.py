"""`moe2dense init`: a folder of YAMLs for a model, its text and the GPUs there are. Joins surgery and operations."""

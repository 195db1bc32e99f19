"""What talks about a run without being one: its size on paper, this machine, the first minutes on GPUs. Imports the trainer."""

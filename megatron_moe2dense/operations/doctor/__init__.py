"""`moe2dense doctor`: what this machine has, what a run would use of it, and what is missing or wrong, before anything starts."""

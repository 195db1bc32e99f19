"""Situations that users met, each with what has to happen in it."""

"""Descriptions of a checkpoint, pickled by the interpreters that name the files: `python tests/trainer/forms/make.py`, with torch alone."""

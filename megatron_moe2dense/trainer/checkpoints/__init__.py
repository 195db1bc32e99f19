"""Saving a run and going on from it: complete, sealed, in any layout."""

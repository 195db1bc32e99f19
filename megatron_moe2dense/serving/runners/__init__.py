"""Scripts for the interpreters of engines and converters: they import nothing of this project, as those need not have it."""

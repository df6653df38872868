"""Side-by-side measurements: against a plain copy of the same bytes, and against other tools."""

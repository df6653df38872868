"""A small image classifier and four experts on real handwritten digits: merging beyond text. See README.md."""

"""A small image classifier and four experts on real handwritten digits: test material that is not text. See README.md."""

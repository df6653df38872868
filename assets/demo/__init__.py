"""A small base model and four experts that were really trained, with exact-answer tasks. See README.md."""

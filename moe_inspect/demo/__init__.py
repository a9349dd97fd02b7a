"""The bundled toy model, its corpus, and the recipe that made it (`python -m
moe_inspect.demo.train`)."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
CORPUS_DIR = Path(__file__).parent / "corpus"

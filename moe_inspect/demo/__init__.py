"""The bundled toy model and its corpus. `tools/demo` in the repository is the recipe that made
them.

May import: nothing of the package.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
CORPUS_DIR = Path(__file__).parent / "corpus"

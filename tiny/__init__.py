"""The embedded default: a small checkpoint (README.md), and the scenes it was trained on (scenes.py)."""

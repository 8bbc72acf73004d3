"""Shared by all tests: the project root on the path, a fixed seed, and one tiny random model."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # float32 on the CPU everywhere: the tolerances are those of float32
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it; torch only where it is loaded already."""
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny():
    """(model, processor): random weights and a tokenizer learned from synthetic prompts and targets. Do not change it."""
    import torch

    import train_sft
    from data import load, prompt, target

    torch.manual_seed(0)
    samples = [*load("synthetic", "det", 112)[:150], *load("synthetic", "cls", 112)[:50]]
    return train_sft.scratch([prompt(s) + target(s) for s in samples])

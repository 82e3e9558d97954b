"""What several test files share: settings of hypothesis, small models, seeds, and the chapter's own package."""
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from gpt import Config
from sample import pick_device

HERE = Path(__file__).parent
STORY = HERE / "the-verdict.txt"
TRAINING_LOG = (HERE / "docs" / "training-log.txt").read_text(encoding="utf-8")  # all that section 5.2 prints
LONG_TESTS = bool(os.environ.get("LONG_TESTS"))
LONG = pytest.mark.skipif(not LONG_TESTS, reason="takes minutes: set LONG_TESTS=1")
TINY = Config(vocab_size=31, context_length=12, emb_dim=8, n_heads=2, n_layers=2, drop_rate=0.3, qkv_bias=True)
ACCELERATOR = pick_device("auto")
NEEDS_ACCELERATOR = pytest.mark.skipif(ACCELERATOR.type == "cpu", reason="there is no accelerator here")
ROUNDING = torch.finfo(torch.float32).eps  # relative: 1.2e-7

# A busy machine is no failure, so there is no deadline. The quick tests try fewer examples.
settings.register_profile("ours", deadline=None, max_examples=100 if LONG_TESTS else 25)
settings.load_profile("ours")


def seeded(seed=123):
    return torch.Generator().manual_seed(seed)


def same(one, two):
    """Whether two values are equal: tensors bit for bit, and what is in tuples and dicts likewise."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def refused(action, *words, error=(ValueError, OSError)):
    """The message of the error that the action ends in: one line with these words."""
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message

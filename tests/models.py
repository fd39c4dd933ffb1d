"""Tiny models, and the sentence that refuses one, for the test files of the base model."""

import pytest
import torch

from base_model import BaseLM
from support.command import UserError

SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.3}


def make_model(model_class, config_class, **more):
    torch.manual_seed(0)
    return model_class(config_class(**SMALL, **more))


def refusal(*arguments, **more):
    """The sentence with which BaseLM.load refuses."""
    with pytest.raises(UserError) as error:
        BaseLM.load(*arguments, **{"device": "cpu", **more})
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)

"""One more token by a compiled program: torch.compile on the base, for --compile.

A program is made for fixed shapes, but a cache grows. So the cache, and attention to what is in it, stay outside. The program
calls back for them, and is made once for answers of all lengths.
"""

import threading

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from base_model import CHECKED_TEXT
from support.command import UserError, one_line

NAME = "memory_decoder"  # of this way to attend, among those that transformers knows
running = threading.local()  # .cache: that of the program which runs in this thread


@torch.library.custom_op("memory_decoder::attend", mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
    """Attention of one query (1, heads, 1, D) to a layer's cache and to its own key and value, which the cache keeps."""
    k, v = running.cache.update(k, v, layer)
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).contiguous()


@attend.register_fake
def attended_shape(q, k, v, layer, scale):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def attention(module, q, k, v, mask, scaling=None, **more):
    """transformers' own attention, but in a program the callback. Returns (attended (B, T, heads, D), None)."""
    if torch.compiler.is_compiling():
        return attend(q, k, v, module.layer_idx, q.shape[-1] ** -0.5 if scaling is None else scaling).transpose(1, 2), None
    return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **more)


def attention_mask(*arguments, **more):
    """transformers' own mask. A program needs none, since one new token may see all before it."""
    return None if torch.compiler.is_compiling() else sdpa_mask(*arguments, **more)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)


class Outside(DynamicCache):
    """Stands in for the cache while a program is made."""

    def update(self, key_states, value_states, layer_idx, *arguments, **more):
        return key_states, value_states


def compile_step(base):
    """Let a BaseLM read single tokens by a compiled program.

    Raises UserError if it cannot be made here, or if its hidden states are not the base's.
    """
    if base.model.config.get_text_config()._attn_implementation != "sdpa":
        raise UserError(f"{base.name} attends in a way of its own and cannot be compiled; leave out --compile.")
    expected, outside = states(base), Outside(config=base.model.config)
    base.model.set_attn_implementation(NAME)

    @torch.compile(fullgraph=True, dynamic=False)
    def program(ids, position):
        return base.decoder(ids, past_key_values=outside, use_cache=True, position_ids=position).last_hidden_state

    def step(ids, cache):
        running.cache = cache
        return program(ids, torch.tensor([[cache.get_seq_length()]], device=base.device))

    base.step = step
    try:
        found = states(base)
    except Exception as error:  # of the model, of the compiler or of PyTorch, which raises many kinds
        raise UserError(f"{base.name} cannot be compiled here ({one_line(error)[:160]}); install a C++ compiler such as g++, or "
                        "leave out --compile.") from None
    rounding = max(1e-3, 12 * torch.finfo(base.head.weight.dtype).eps)
    if not (found - expected).norm() <= rounding * expected.norm():
        raise UserError(f"{base.name} gives other states when it is compiled, so its answers would be wrong; leave out --compile.")


def states(base):
    """The base's hidden states (2, H) of a text's last two tokens, which are read one by one."""
    ids, cache = torch.tensor([base.encode(CHECKED_TEXT)]), base.new_cache()
    base.hidden(ids[:, :-2], cache)
    return torch.cat([base.hidden(token.view(1, 1), cache)[0].float() for token in ids[0, -2:]])

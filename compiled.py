"""torch.compile for one more token of the base, for app.py --compile.

A compiled graph has fixed shapes, but the KV cache grows. So the cache and its attention stay outside the graph, in a custom
operator. One compilation then serves all lengths.
"""

import threading

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from base_model import CHECKED_TEXT
from support.command import UserError, one_line
from support.machine import lacks_memory

NAME = "memory_decoder"  # under which transformers knows this attention
running = threading.local()  # .cache: the KV cache of the answer that this thread computes


def attend(q, k, v, layer, scale):
    """Attention of one query (1, heads, 1, D) to a layer's cache and to its own key and value, which the cache keeps."""
    k, v = running.cache.update(k, v, layer)
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).contiguous()


# Not torch.library.custom_op: it adds checks to every call, which are slow for one token.
torch.library.define("memory_decoder::attend", "(Tensor q, Tensor k, Tensor v, int layer, float scale) -> Tensor")
torch.library.impl("memory_decoder::attend", "CompositeExplicitAutograd", attend)
torch.library.register_fake("memory_decoder::attend", lambda q, k, v, layer, scale: q.new_empty((*q.shape[:-1], v.shape[-1])))


def attention(module, q, k, v, mask, scaling=None, **more):
    """transformers' own attention. While compiling, the custom operator instead. Returns (attended (B, T, heads, D), None)."""
    if torch.compiler.is_compiling():
        if any(more.get(name) is not None for name in ("position_bias", "s_aux", "softcap")):
            raise NotImplementedError("its attention has more than queries, keys and values")
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.memory_decoder.attend(q, k, v, module.layer_idx, scale).transpose(1, 2), None
    return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **more)


def attention_mask(*arguments, **more):
    """transformers' own mask. While compiling there is none, since one new token may see all before it."""
    return None if torch.compiler.is_compiling() else sdpa_mask(*arguments, **more)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)


class Outside(DynamicCache):
    """Takes the cache's place while compiling. It stores nothing, since the operator keeps keys and values."""

    def update(self, key_states, value_states, layer_idx, *arguments, **more):
        return key_states, value_states


def compile_step(base):
    """Let a BaseLM read single tokens by a compiled graph.

    Raises UserError if it cannot be made here, or if its hidden states are not the base's. The base is then as before.
    """
    config = base.model.config.get_text_config()
    by_length = "chunked_attention" in (getattr(config, "layer_types", None) or ()) or getattr(config, "attn_temperature_tuning", 0)
    if config._attn_implementation != "sdpa" or by_length:
        raise UserError(f"{base.name} attends in a way of its own and cannot be compiled; leave out --compile.")
    expected = states(base)
    try:
        base.step = compiled_step(base)
        found = states(base)
        rounding = max(1e-3, 12 * torch.finfo(base.head.weight.dtype).eps)
        if not (found - expected).norm() <= rounding * expected.norm():
            raise UserError(f"{base.name} gives other states when it is compiled, so its answers would be wrong; leave out "
                            "--compile.")
    except Exception as error:  # of the model, of the compiler or of PyTorch, which raises many kinds
        base.step = None
        base.model.set_attn_implementation("sdpa")
        if isinstance(error, UserError) or lacks_memory(error):
            raise
        remedy = "install a C++ compiler or " if "C++ compiler" in str(error) else ""
        raise UserError(f"{base.name} cannot be compiled here ({one_line(error)[:160]}); {remedy}leave out --compile.") from None


def compiled_step(base):
    """A function (ids (1, 1), cache) -> hidden state (1, 1, H), compiled at its first call."""
    outside = Outside(config=base.model.config)
    base.model.set_attn_implementation(NAME)

    @torch.compile(fullgraph=True, dynamic=False)
    def graph(ids, position):
        return base.decoder(ids, past_key_values=outside, use_cache=True, position_ids=position).last_hidden_state

    def step(ids, cache):
        running.cache = cache
        try:
            return graph(ids, torch.tensor([[cache.get_seq_length()]], device=base.device))
        finally:
            running.cache = None  # threads live longer than conversations
    return step


def states(base):
    """The base's hidden states (2, H) of a text's last two tokens, which are read one by one."""
    ids, cache = torch.tensor([base.encode(CHECKED_TEXT)]), base.new_cache()
    base.hidden(ids[:, :-2], cache)
    return torch.cat([base.hidden(token.view(1, 1), cache)[0].float() for token in ids[0, -2:]])

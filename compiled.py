"""One more token by compiled programs: torch.compile on base and memory, for --compile.

A program is made for fixed shapes, but a cache grows. So the caches, and attention to what is in them, stay outside. The programs
call back for them. Each is made once, for answers of all lengths.
"""

import threading

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from base_model import CHECKED_TEXT
from memory_decoder import DecoderCache
from support.command import UserError, one_line

NAME = "memory_decoder"  # of this way to attend, among those that transformers knows
running = threading.local()  # .attend: what the program that runs in this thread calls


@torch.library.custom_op("memory_decoder::attend", mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
    """Attention of one query (1, heads, 1, D) to a layer's cache and to its own key and value, which the cache keeps."""
    return running.attend(layer, q, k, v, scale).contiguous()


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
    """Stands in for both caches while a program is made."""

    def update(self, key_states, value_states, layer_idx, *arguments, **more):
        return key_states, value_states

    def attend(self, layer, q, k, v, context):
        return attend(q, k, v, layer, 0.0)


class CompiledStep:
    """Reads one more token as a base and its memory do, but faster. The caches are the usual ones."""

    def __init__(self, base, decoder):
        """Make both programs. Raises UserError if that fails here, or if they say something else than base and memory."""
        self.base, self.decoder, outside = base, decoder, Outside(config=base.model.config)
        how = {"fullgraph": True, "dynamic": False}
        self.read = torch.compile(lambda ids, position: base.decoder(ids, past_key_values=outside, use_cache=True,
                                                                     position_ids=position).last_hidden_state, **how)
        self.think = torch.compile(lambda hidden: decoder.features(hidden, outside), **how)
        if base.model.config.get_text_config()._attn_implementation not in ("sdpa", NAME):
            raise UserError(f"{base.name} attends in a way of its own and cannot be compiled; leave out --compile.")
        expected = self.states(base, decoder)
        try:
            base.model.set_attn_implementation(NAME)
            found = self.states(self, self)
        except Exception as error:  # of the model, of the compiler or of PyTorch, which raises many kinds
            raise UserError(f"{base.name} cannot be compiled here ({one_line(error)[:160]}); install a C++ compiler such as g++, "
                            "or leave out --compile.") from None
        most = max(1e-3, 12 * torch.finfo(base.head.weight.dtype).eps)
        if not all((a - b).norm() <= most * a.norm() for a, b in zip(expected, found, strict=True)):
            raise UserError(f"{base.name} gives other states when it is compiled, so its answers would be wrong; leave out "
                            "--compile.")

    @torch.no_grad()
    def hidden(self, ids, cache):
        """BaseLM.hidden for one id (1, 1)."""
        running.attend = lambda layer, q, k, v, scale: F.scaled_dot_product_attention(q, *cache.update(k, v, layer), scale=scale,
                                                                                      enable_gqa=True)
        position = torch.tensor([[cache.get_seq_length()]], device=self.base.device)
        return self.read(ids.to(self.base.device), position)

    @torch.no_grad()
    def features(self, hidden, cache):
        """MemoryDecoder.features for one position (1, 1, H)."""
        blocks = self.decoder.blocks
        running.attend = lambda layer, q, k, v, _: cache.attend(layer, q, k, v, blocks[layer].context)
        return self.think(hidden)

    @torch.no_grad()
    def states(self, reader, memory_reader):
        """The hidden states and features of two tokens behind a few others, the two read one by one by what is given."""
        ids, cache, memory_cache = torch.tensor([self.base.encode(CHECKED_TEXT)]), self.base.new_cache(), DecoderCache()
        self.decoder.features(self.base.hidden(ids[:, :-2], cache).float(), memory_cache)
        hidden = [reader.hidden(token.view(1, 1), cache).float() for token in ids[0, -2:]]
        return hidden + [memory_reader.features(state, memory_cache) for state in hidden]

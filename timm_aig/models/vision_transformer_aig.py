"""Vision transformers: gated attention and MLP, and <arch>_aig for timm.models.vision_transformer and deit.

A transformer block has two residual branches, so it gets two gates. A gate sees the mean of all tokens.
"""
from functools import partial
from typing import Any, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Attention, Mlp, maybe_add_mask, resolve_self_attn_mask
from timm.models.vision_transformer import Block, checkpoint_filter_fn

from ..blocks import GatedBranch, gated_form_of
from .entry_points import Family, register_family

__all__ = ['GatedAttention', 'GatedMlp']  # register_family adds each entry point


@gated_form_of(Attention, Block, 'attn')
class GatedAttention(GatedBranch, Attention):
    """timm's Attention with a gate. If it has an elementwise gate of its own, it gets no other."""

    def residual(
            self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False) -> torch.Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(
                q, k, v,
                attn_mask=attn_mask,
                dropout_p=self.attn_drop.p if self.training else 0.,
                is_causal=is_causal,
            )
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = maybe_add_mask(attn, resolve_self_attn_mask(N, attn, attn_mask, is_causal))
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        x = self.norm(x.transpose(1, 2).reshape(B, N, self.attn_dim))
        return self.proj_drop(self.proj(x))

    @staticmethod
    def in_channels(block: Any) -> Optional[int]:
        return None if block.gate is not None else block.qkv.in_features

    @torch.jit.ignore
    def ungated(self) -> nn.Module:
        block: Any = super().ungated()
        block.gate = None
        return block


@gated_form_of(Mlp, Block, 'mlp')
class GatedMlp(GatedBranch, Mlp):
    """timm's Mlp with a gate."""

    def residual(
            self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False) -> torch.Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


for modules, filter_fn in (
        (('vision_transformer',), checkpoint_filter_fn),
        (('deit',), partial(checkpoint_filter_fn, adapt_layer_scale=True))):
    register_family(__name__, Family(
        modules, filter_fn, lambda parent: dict(out_indices=3, feature_cls='getter')))

"""Four kinds of transformers' layers in operations that suit a GPU: the embedding of patches, the
norms, and the vision tower's attention and MLPs. Weights and mathematics are the same."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VLMLP,
    Qwen2_5_VLRMSNorm,
)


class LinearPatchEmbed(Qwen2_5_VisionPatchEmbed):
    """transformers' convolution of patches (n, 3 * 2 * 14 * 14) -> (n, E). Its stride is its
    kernel, so it is a matrix product, which a GPU computes 14 times faster in bf16."""

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight)


class FusedRMSNorm(Qwen2_5_VLRMSNorm):
    """transformers' norm in one kernel instead of eight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        # Autocast would give float32, which each of the following products casts again. The kernel
        # itself adds in float32.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, weight.shape, weight, self.variance_epsilon)


class AlignedMLP(Qwen2_5_VLMLP):
    """transformers' MLP of the vision tower, padded with zeros from 3,420 hidden units to 3,424: a
    GPU is slow at bf16 rows that are no multiple of 16 bytes."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if any(hasattr(linear, "lora_A") for linear in (gate, up, down)):
            return super().forward(x)  # .weight is the one below the adapters
        pad = -self.intermediate_size % 8

        def padded(linear: torch.nn.Linear) -> Tensor:
            return F.linear(x, F.pad(linear.weight, (0, 0, 0, pad)), F.pad(linear.bias, (0, pad)))

        hidden = self.act_fn(padded(gate)) * padded(up)
        return F.linear(hidden, F.pad(down.weight, (0, pad)), down.bias)


def use_fused_layers(model: Qwen) -> Qwen:
    """Replace these layers, in place."""
    visual = model.model.visual
    visual.patch_embed.__class__ = LinearPatchEmbed
    for module in model.modules():
        if isinstance(module, Qwen2_5_VLRMSNorm):
            module.__class__ = FusedRMSNorm
    for block in visual.blocks:
        if block.mlp.intermediate_size % 8:
            block.mlp.__class__ = AlignedMLP
    # Not when it is built: transformers then takes the name for one of flash-attn's.
    visual.config._attn_implementation = "flash_windows"
    return model


def window_attention(
    module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor,  # noqa: ARG001
    attention_mask: None,  # noqa: ARG001
    scaling: float, cu_seq_lens_q: Tensor, **_: object,
) -> tuple[Tensor, None]:
    """The vision tower's attention: each of S patches attends to the patches of its window, or of
    its image. q, k and v (1, H, S, D) -> (output (1, S, H, D), None).

    cu_seq_lens_q  (windows + 1,) where the windows begin and end, on the CPU

    Windows of one size are rows of one call: 1 instead of 16 for 448 px, in each of 28 layers.
    """
    lengths = cu_seq_lens_q.diff().tolist()
    if len(set(lengths)) == 1:
        q, k, v = (x[0].unflatten(1, (-1, lengths[0])).transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)            # (windows, H, ., D)
        return out.transpose(1, 2).flatten(0, 1)[None], None
    windows = zip(*(x.split(lengths, 2) for x in (q, k, v)))
    out = torch.cat([F.scaled_dot_product_attention(*w, scale=scaling) for w in windows], 2)
    return out.transpose(1, 2), None


# A name with "flash" in it is handed all windows in one call.
AttentionInterface.register("flash_windows", window_attention)

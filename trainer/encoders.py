"""f_I and f_T: a timm ViT, and a text transformer of timm's blocks (METHOD §3)."""

from typing import Any

import timm
import torch
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ImageEncoder(nn.Module):
    """f_I: image → h, the class token after the final norm. It never sees the augmentation vector.

    `arch` is a timm ViT name; patch, width, depth and heads override its own where given. Raises ValueError for a timm
    model that is no ViT with a class token.
    """

    def __init__(self, arch: str, size: int, patch: int | None = None, width: int | None = None,
                 depth: int | None = None, heads: int | None = None):
        super().__init__()
        if not timm.is_model(arch):  # timm would ask the Hub for hf-hub:ORG/NAME, which a checkpoint of anybody may name
            raise ValueError(f"{arch!r} is no architecture of timm")
        own: dict[str, Any] = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
        vit = timm.create_model(arch, pretrained=False, num_classes=0, img_size=size, global_pool="token",
                                **{name: value for name, value in own.items() if value is not None})
        if not isinstance(vit, VisionTransformer) or vit.cls_token is None:
            raise ValueError(f"{arch} is not a timm VisionTransformer with a class token")
        self.vit, self.width, self.size = vit, vit.num_features, size

    def forward(self, image_BCHW: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B W"]:
        """(B, 3, S, S) → h (B, width)."""
        return self.vit(image_BCHW)


class TextEncoder(nn.Module):
    """f_T: token ids → the last activation of the start token, or of the end token.

    The start token sees the caption only under bidirectional attention; the end token is CLIP's and goes with causal
    attention. Padding is whatever follows the first end token. Norms are torch's (ε = 1e-5), as in CLIP and open_clip.
    """

    def __init__(self, vocab_size: int, context: int, width: int, depth: int, heads: int, end_id: int,
                 pooling: str = "start"):
        super().__init__()
        self.pooling, self.end_id, self.width, self.recompute = pooling, end_id, width, False
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.apply(_initialise)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    def forward(self, token_BL: Int[Tensor, "B L"]) -> Float[Tensor, "B W"]:
        """(B, L) int64 → (B, width)."""
        state_BLW, real_BL = self.states(token_BL), self.real(token_BL)
        at_B = torch.zeros_like(token_BL[:, 0]) if self.pooling == "start" else real_BL.sum(1) - 1
        return self.norm(state_BLW[torch.arange(state_BLW.shape[0], device=state_BLW.device), at_B])  # len() would fix B

    def real(self, token_BL: Int[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
        """Which tokens are no padding."""
        is_end_BL = token_BL == self.end_id
        return is_end_BL.cumsum(1) - is_end_BL.long() == 0

    def states(self, token_BL: Int[Tensor, "B L"]) -> Float[Tensor, "B L W"]:
        """The last block's output at every token, before the norm → (B, L, width)."""
        real_BL = self.real(token_BL)
        x_BLW = self.token(token_BL) + self.position[: token_BL.shape[1]]
        mask = real_BL[:, None, None, :]
        if self.pooling == "end":
            length = token_BL.shape[1]
            mask = mask & torch.ones(length, length, dtype=torch.bool, device=token_BL.device).tril()
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_BLW = checkpoint(block, x_BLW, attn_mask=mask, use_reentrant=False)
            else:
                x_BLW = block(x_BLW, attn_mask=mask)
        return x_BLW


def _initialise(module: nn.Module) -> None:
    """timm's ViT initialisation, for the blocks that timm initialises only inside its own models."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

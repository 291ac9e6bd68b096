"""UniCLIP: two towers, the augmentation encoder, residual heads, one embedding space."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.schema import IDENTITY
from trainer.auxiliary import Declip, make_auxiliary
from trainer.config import ModelConfig, ObjectiveConfig
from trainer.encoders import ImageEncoder, TextEncoder
from trainer.heads import HEADS, AugmentationEncoder
from trainer.similarity import Similarity


class UniCLIP(nn.Module):
    """f_I, f_T, f_A, g_I, g_T and the similarity's τ and b. Embeddings are raw: losses and evaluation normalise them.

    B groups, V views, T texts, L tokens, W width, A = 11, D embedding. Without `head.augmentation` there is no f_A, and only
    the objectives of trainer.auxiliary have heads there.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, end_id: int, learn_offset: bool = True,
                 objective: ObjectiveConfig = ObjectiveConfig()):  # noqa: B008  # frozen
        super().__init__()
        image, text, head = config.image, config.text, config.head
        self.image = ImageEncoder(image.arch, image.size, image.patch, image.width, image.depth, image.heads)
        self.text = TextEncoder(vocab_size, text.context, text.width, text.depth, text.heads, end_id, text.pooling)
        self.augmentation = AugmentationEncoder(head.augmentation_width) if head.augmentation else None
        condition = head.augmentation_width if head.augmentation else 0
        self.image_head = HEADS[head.kind](self.image.width, condition, head.depth, config.dim)
        self.text_head = nn.Linear(text.width, config.dim)
        self.similarity = Similarity(config.similarity.kind, config.similarity.temperature, learn_offset)
        self.auxiliary = make_auxiliary(objective, self.image.width, text.width, vocab_size, config.dim)
        self.register_buffer("identity_A", torch.from_numpy(IDENTITY.copy()), persistent=False)

    def recompute(self, enable: bool) -> "UniCLIP":
        """Compute the blocks' activations again in the backward pass instead of keeping them."""
        self.image.vit.set_grad_checkpointing(enable)
        self.text.recompute = enable
        return self

    def image_features(self, image_BCHW: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B W"]:
        """h: what linear probe and fine-tuning use → (B, width)."""
        return self.image(image_BCHW)

    def encode_image(self, image_BCHW: Float[Tensor, "B 3 S S"],
                     vector_BA: Float[Tensor, "B 11"] | None = None) -> Float[Tensor, "B D"]:
        """z of images seen through the augmentation `vector_BA`; the identity when it is not given → (B, D)."""
        return self.project_image(self.image(image_BCHW), vector_BA)

    def project_image(self, h_BW: Float[Tensor, "B W"], vector_BA: Float[Tensor, "B 11"] | None = None
                      ) -> Float[Tensor, "B D"]:
        """z from h: g_I, and f_A's view of the vector; the identity when it is not given → (B, D)."""
        if self.augmentation is None:
            return self.image_head(h_BW)
        if vector_BA is None:
            vector_BA = self.get_buffer("identity_A").expand(h_BW.shape[0], -1)
        return self.image_head(h_BW, self.augmentation(vector_BA))

    def encode_text(self, token_BL: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """z of captions → (B, D)."""
        return self.text_head(self.text(token_BL))

    def forward(self, views: list[Float[Tensor, "B 3 S S"]], vector_BVA: Float[Tensor, "B V 11"],
                token_BTL: Int[Tensor, "B T L"]) -> tuple[Tensor, ...]:
        """V tensors (B, 3, S, S), vectors, tokens → image (B, V, D) and text (B, T, D) embeddings.

        With auxiliary heads also h (B, V, W); with those of DeCLIP the last text is not embedded, but its masked words are
        predicted → (B, 2), see `Words`.
        """
        h_image = self.image(torch.cat(views))
        z_image = self.project_image(h_image, vector_BVA.transpose(0, 1).flatten(0, 1))
        image_BVD, h_BVW = (x.unflatten(0, (len(views), -1)).transpose(0, 1) for x in (z_image, h_image))
        if not isinstance(self.auxiliary, Declip):
            return (image_BVD, self._texts(token_BTL)) if self.auxiliary is None else (
                image_BVD, self._texts(token_BTL), h_BVW)
        masked_BL, chosen_BL = token_BTL[:, -1], token_BTL[:, -1] < 0
        state_BLW = self.text.norm(self.text.states(torch.where(chosen_BL, -1 - masked_BL, masked_BL)))
        return (image_BVD, self._texts(token_BTL[:, :-1]), h_BVW,
                self.auxiliary.words(state_BLW, token_BTL[:, 0], chosen_BL))

    def _texts(self, token_BTL: Int[Tensor, "B T L"]) -> Float[Tensor, "B T D"]:
        return self.encode_text(token_BTL.flatten(0, 1)).unflatten(0, (-1, token_BTL.shape[1]))

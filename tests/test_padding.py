"""Texts are encoded without the columns that only hold padding: the same embeddings and gradients for less work."""

import pytest
import torch

from trainer.batches import LENGTHS, without_padding
from trainer.config import ModelConfig
from trainer.flops import flops_by_length, flops_per_sample
from trainer.model import UniCLIP

END, CONTEXT = 99, 77


def model(pooling: str) -> UniCLIP:
    torch.manual_seed(0)
    return UniCLIP(ModelConfig.model_validate({
        "dim": 16, "image": {"arch": "vit_tiny_patch16_224", "size": 32, "width": 32, "depth": 1, "heads": 2},
        "text": {"width": 32, "depth": 2, "heads": 2, "context": CONTEXT, "pooling": pooling}}), 100, END).double()


def texts(*lengths: int) -> torch.Tensor:
    """Texts of so many tokens, the end token among them, as (B, 1, CONTEXT)."""
    token_BL = torch.zeros(len(lengths), CONTEXT, dtype=torch.long)
    for row, length in zip(token_BL, lengths, strict=True):
        row[:length] = torch.randint(1, END, (length,))
        row[length - 1] = END
    return token_BL[:, None]


@pytest.mark.parametrize("pooling", ["start", "end"])
def test_embeddings_and_gradients_are_the_whole_texts(pooling):
    token_BTL = texts(5, 17, 3)
    results = []
    for tokens in (token_BTL, without_padding(token_BTL, END)):
        clip = model(pooling)
        z_BD = clip.encode_text(tokens[:, 0])
        z_BD.sin().sum().backward()
        results.append([z_BD.detach(), *(p.grad for p in clip.text.parameters())])
    assert tokens.shape == (3, 1, 24)
    for whole, short in zip(*results, strict=True):
        torch.testing.assert_close(short, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("longest", "columns"), [(1, 12), (12, 12), (13, 16), (48, 48), (49, 77), (77, 77)])
def test_no_word_is_cut_and_few_widths_exist(longest, columns):
    assert without_padding(texts(longest, 1), END).shape[2] == columns


def test_a_text_without_an_end_keeps_every_column():
    assert without_padding(torch.ones(2, 1, CONTEXT, dtype=torch.long), END).shape[2] == CONTEXT
    assert without_padding(texts(7)[:, :, :10], END).shape[2] == 10


def test_only_columns_that_are_encoded_count_as_work():
    flops = flops_by_length(model("start").float(), 3, 16)
    assert sorted(flops) == [*LENGTHS, CONTEXT]
    assert flops[12] < flops[48] < flops[CONTEXT] == flops_per_sample(model("start").float(), 3, 16)

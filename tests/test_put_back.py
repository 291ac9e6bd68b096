"""What a checkpoint holds goes into a new run: on another device too, and only its own faults are called its own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from pipeline.console import InputError, WorkFailed
from trainer import checkpoint
from trainer.training import _put_back
from trainer.weights_file import fitting


@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_of_another_device_goes_on_as_this_device_computes(fused):
    """On a GPU the optimizer is fused, on a CPU it is not."""
    def made(fused: bool) -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        groups = [{"params": list(model.parameters()), "weight_decay": 0.1, "lr_scale": 1.0}]
        return model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=fused)

    def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    first, before = made(not fused)
    step(first, before)
    saved = copy.deepcopy(get_optimizer_state_dict(first, before))
    second, after = made(fused)
    second.load_state_dict(first.state_dict())
    _put_back(checkpoint.Tensors({}, saved, None, torch.get_rng_state()), second, after)
    assert [group["fused"] for group in after.param_groups] == [fused]
    step(first, before)
    second.zero_grad()
    second.weight.grad, second.bias.grad = first.weight.grad, first.bias.grad
    after.step()
    torch.testing.assert_close(second.weight, first.weight)


@pytest.mark.parametrize("error", [WorkFailed("other samples"), torch.OutOfMemoryError("CUDA out of memory"),
                                   torch.distributed.DistBackendError("a rank ended"), torch.AcceleratorError("CUDA error")])
def test_what_the_work_met_is_not_called_the_file_s_fault(error):
    with pytest.raises(type(error)) as met, fitting(Path("average.safetensors"), "the model"):
        raise error
    assert met.value is error
    with pytest.raises(InputError, match=r"average.safetensors does not fit"):  # noqa: SIM117
        with fitting(Path("average.safetensors"), "the model"):
            raise RuntimeError("sizes must match")

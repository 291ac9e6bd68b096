"""A profile's table counts what was computed, and holds it against what the device can do."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.utils.flop_counter import FlopCounterMode

from tools import profiles
from tools.profiles import Ceilings, Profile, Row, reduce, table, traced


def operator(number: int, name: str, begin: float, took: float, *shapes: list[int], kind: str = "c10::BFloat16") -> dict:
    strides = [[1] * len(shape) for shape in shapes]
    return {"ph": "X", "cat": "cpu_op", "name": name, "tid": 1, "ts": begin, "dur": took, "args": {
        "External id": number, "Input Dims": list(shapes), "Input Strides": strides, "Input type": [kind] * len(shapes)}}


def launch(number: int | None, name: str, took: float, category: str = "kernel", **more: int) -> dict:
    return {"ph": "X", "cat": category, "name": name, "tid": 7, "ts": 0.0, "dur": took,
            "args": {**({} if number is None else {"External id": number}), **more}}


def test_a_gpus_trace_by_hand():
    """A product whose kernel needs a second one, attention whose kernel is an inner operator's, a copy, and DALI's kernel."""
    query = [2, 4, 16, 8]
    rows = {row.kernel: row for row in reduce({"traceEvents": [
        operator(1, "aten::linear", 0, 50, [32, 64], [128, 64]),
        operator(2, "aten::addmm", 10, 30, [128], [32, 64], [64, 128]),
        launch(2, "gemm", 100.0), launch(2, "splitK_reduce", 10.0),
        operator(3, "aten::_scaled_dot_product_flash_attention_backward", 60, 30, query, query, query, query),
        operator(4, "aten::_flash_attention_backward", 65, 20, [2, 16, 4, 8]),
        launch(4, "flash_bwd", 40.0),
        operator(5, "aten::copy_", 100, 10, [1000], kind="float"), launch(5, "Memcpy HtoD", 5.0, "gpu_memcpy", bytes=4000),
        launch(None, "dali::resample", 20.0)]})}
    assert list(rows) == ["gemm", "flash_bwd", "dali::resample", "splitK_reduce", "Memcpy HtoD"]
    assert rows["gemm"] == Row("aten::addmm", "gemm", pytest.approx(1e-4), 1, 2 * 32 * 64 * 128, 2 * (128 + 32 * 64 + 64 * 128))
    assert rows["splitK_reduce"].flops == rows["splitK_reduce"].bytes == 0
    attention = rows["flash_bwd"]
    assert attention.operator == "aten::_scaled_dot_product_flash_attention_backward"
    assert attention.flops == 5 * 2 * (2 * 4) * 16 * 16 * 8
    assert rows["Memcpy HtoD"].bytes == 4000 and rows["dali::resample"].operator == ""


def test_an_authors_count_is_used_for_a_kernel_of_our_own():
    row, = reduce({"traceEvents": [launch(None, "_log_sums", 1.0), launch(None, "_log_sums", 2.0)]}, {"_log_sums": 7.0})
    assert (row.calls, row.flops) == (2, 7.0)


def test_values_that_do_not_lie_in_memory_are_no_bytes():
    read = operator(1, "aten::add", 0, 5, [10, 100], kind="float")
    read["args"]["Input Strides"] = [[0, 1]]
    row, = reduce({"traceEvents": [read, launch(1, "add", 1.0)]})
    assert row.bytes == 400


def net() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(16, 16), nn.GELU())
    return patches, [torch.randn(4, 3, 16, 16), torch.randn(4, 2, 8, 16, requires_grad=True)]


def test_flops_of_a_real_trace_are_those_of_torchs_own_counter():
    model, (image, query) = net()

    def step() -> None:
        (model(image).sum() + attend(query, query, query).sum()).backward()

    with FlopCounterMode(display=False) as counter:
        step()
    found = traced(step, "cpu", steps=2)
    assert sum(row.flops for row in found.rows) == 2 * counter.get_total_flops()
    assert {"aten::addmm", "aten::mm"} & {row.operator for row in found.rows}
    assert 0 <= found.idle <= 1


def test_the_table_shares_the_time_out_and_names_both_ceilings():
    rows = [Row("aten::mm", "void gemm", 0.06, 4, 3e9, 0.0), Row("aten::add", "add", 0.03, 2, 0.0, 6e6),
            *(Row(f"aten::op{n}", "tiny", 1e-4, 1) for n in range(100))]
    lines = table("A step", Profile(2, 0.2, rows), Ceilings(1e11, 1e9)).splitlines()
    assert lines[2].startswith("100.0 ms a step, the device idle for 50% of it.")
    assert "products 0.1 TFLOP/s, copies 1 GB/s" in lines[2]
    assert lines[6] == "| mm | gemm | 60.0% | 2 | 30.00 | 0.1 | 50% |  |  |"
    assert lines[7] == "| add | add | 30.0% | 1 | 15.00 |  |  | 0.2 | 20% |"
    assert lines[-1] == "| others | 100 more | 10.0% | | 5.00 | | | | |"


def test_ceilings_are_measured(monkeypatch):
    """They grow with what is counted, not with the size of the work."""
    found = []
    for sizes in ((256, 2**22), (384, 2**23)):
        monkeypatch.setitem(profiles.SIZES, "cpu", sizes)
        found.append(Ceilings.measure("cpu"))
    for first, second in zip(vars(found[0]).values(), vars(found[1]).values(), strict=True):
        assert 0.1 < first / second < 10
    assert min(one.flops for one in found) > 1e8 and min(one.bandwidth for one in found) > 1e7

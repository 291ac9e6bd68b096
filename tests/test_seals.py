"""Lines with and without a checksum, whole, torn and foreign: none is lost, and none is called damaged that is not."""

import json

import pytest

from evaluation.results import append_rows, read_rows
from pipeline.seals import Damaged, open_json, sealed_json
from trainer.log import METRICS, cut_back


def test_a_last_row_that_lacks_only_its_end_of_line_stays_when_rows_are_added(tmp_path):
    out = tmp_path / "r.jsonl"
    append_rows(out, [{"metric": "a", "value": 0.5}, {"metric": "b", "value": 0.6}])
    out.write_bytes(out.read_bytes()[:-1])
    assert [row["metric"] for row in read_rows(out)] == ["a", "b"]
    append_rows(out, [{"metric": "c", "value": 0.7}])
    assert [row["metric"] for row in read_rows(out)] == ["a", "b", "c"]


def test_a_log_s_last_line_that_lacks_only_its_end_stays_when_the_run_goes_on(tmp_path):
    log = tmp_path / METRICS
    whole = [sealed_json({"samples": n, "loss": n / 7}) for n in (16, 32)]
    log.write_bytes(b"\n".join(whole))
    cut_back(log, 32)
    assert log.read_bytes() == b"\n".join(whole) + b"\n"


def test_lines_of_a_log_that_tell_no_number_of_samples_are_left_out_and_counted(tmp_path, capsys):
    log = tmp_path / METRICS
    log.write_bytes(b'{"samples": 16}\n{"samples": "x"}\n{"loss": 1}\n' + b'{"samples": ' + b"[" * 200_000 + b"\n")
    cut_back(log, 32)
    assert log.read_bytes() == b'{"samples": 16}\n'
    assert "3 damaged lines are left out" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("foreign", [
    {"a": 1, "split": "trainval"}, {"a": 1, "index": "abcdefgh"}, {"a": 1, "score": "abcdefghi"}])
def test_other_people_s_json_of_the_form_of_ours_is_read_and_each_flipped_bit_of_ours_found(foreign):
    assert open_json(json.dumps(foreign).encode()) == foreign
    sealed = sealed_json(foreign)
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((Damaged, ValueError)):
            print(bit, open_json(bytes(flipped)))

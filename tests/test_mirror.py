"""A published mirror's tars, with every fault planted that such sets have: each is reported, each healthy sample indexed."""

import json
from pathlib import Path

import numpy as np
from conftest import encoded, picture
from PIL import Image
from test_index import write_tar

from pipeline.index import Index
from pipeline.indexing import build


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(orientation), exif=exif)


def _plant(folder: Path) -> tuple[dict[str, tuple[int, int]], list[tuple[str, str]]]:
    """Healthy key → upright (width, height), and (key, reason) of each fault."""
    healthy, members, faults = {}, [], []
    for orientation in range(1, 9):
        members += [(f"turned{orientation}.jpg", _turned(orientation)), (f"turned{orientation}.txt", "turned")]
        healthy[f"turned{orientation}"] = (60, 80) if orientation > 4 else (80, 60)
    for number, (suffix, format) in enumerate((("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))):
        members += [(f"kind{number}.{suffix}", encoded(picture(number), format)),
                    (f"kind{number}.json", json.dumps({"caption": f"a {suffix}"}))]
        healthy[f"kind{number}"] = (80, 60)
    jpeg = encoded(picture(1, 400, 300))
    for key, image, text, reason in (
            ("cut", jpeg[:len(jpeg) // 2], "x", "broken image"), ("html", b"<html>", "x", "not an image"),
            ("nothing", b"", "x", "not an image"), ("mute", jpeg, "", "no caption"),
            ("bytes", jpeg, b"\xff\xfe", "caption is not UTF-8")):
        members += [(f"{key}.jpg", image), (f"{key}.txt", text)]
        faults.append((key, reason))
    members += [("lonely.txt", "x"), ("silent.jpg", jpeg), ("kind0.jpg", jpeg), ("kind0.txt", "again")]
    faults += [("lonely", "no image"), ("silent", "no caption"), ("kind0", "duplicate key")]
    write_tar(folder / "00000.tar", members)
    torn = write_tar(folder / "00001.tar", [(f"t{number}.{suffix}", data) for number in range(4)
                                            for suffix, data in (
                                                ("txt", "x"), ("jpg", encoded(picture(20 + number, 400, 300))))])
    torn.write_bytes(torn.read_bytes()[:-10240 - 3000])
    healthy |= {f"t{number}": (400, 300) for number in range(3)}
    faults.append(("t3", "truncated tar"))
    return healthy, faults


def test_every_fault_is_reported_and_every_healthy_sample_is_there(tmp_path):
    healthy, faults = _plant(tmp_path)
    manifest = build(tmp_path, 1)
    reported = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").open()]
    assert sorted((line["key"], line["reason"].partition(":")[0]) for line in reported) == sorted(faults)
    index = Index.open(tmp_path)
    columns = index.columns(np.arange(len(index)))
    assert {index.key(row): (columns["width"][row], columns["height"][row]) for row in range(len(index))} == healthy
    assert (manifest["counts"]["samples"], manifest["counts"]["merged"]) == (len(healthy), 0)
    assert sum(manifest["counts"]["excluded"].values()) == len(faults)

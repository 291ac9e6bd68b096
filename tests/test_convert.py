"""Original archives in miniature → the WebDataset layout: labels bound to the archive's own names, bytes untouched."""

import hashlib
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, picture
from PIL import Image
from scipy.io import savemat

from evaluation import catalogue
from evaluation.catalogue import CATALOGUE, classnames, identify, official_order, templates
from evaluation.check import check
from evaluation.convert import convert
from evaluation.torchvision_sets import from_torchvision
from pipeline.console import InputError, WorkFailed
from pipeline.evalsets import open_evalset, write_evalset

Files = dict[str, bytes]


def jpg(seed: int) -> bytes:
    return encoded(picture(seed, 24, 16))


def text(*lines: str) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def mat(**values) -> bytes:
    stream = io.BytesIO()
    savemat(stream, values)
    return stream.getvalue()


def records(rows: list[dict]) -> np.ndarray:
    """A MATLAB struct array."""
    array = np.empty((1, len(rows)), [(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        for name, value in row.items():
            array[0, i][name] = value
    return array


def pets() -> dict[str, Files]:
    """Class ids from 1 in the order of the names without regard to case; cats are capitalised, dogs are not."""
    breeds = ["_".join(name.split()) if i % 3 else "_".join(name.split()).lower()
              for i, name in enumerate(classnames("pets"))]
    of = {split: [f"{breed}_{n} {i + 1} 1 1" for i, breed in enumerate(breeds)]
          for split, n in (("trainval", 7), ("test", 12))}
    images = {f"images/{line.split()[0]}.jpg": jpg(i) for i, line in enumerate(of["trainval"] + of["test"])}
    return {"annotations.tar.gz": {"annotations/list.txt": text("#Image CLASS-ID"),
                                   **{f"annotations/{split}.txt": text(*lines) for split, lines in of.items()},
                                   "annotations/xmls/x.xml": b"<x/>"},
            "images.tar.gz": dict(sorted(images.items()))}


def food() -> dict[str, Files]:
    lines = {"train": ["waffles/1", "apple_pie/2", "apple_pie/3"], "test": ["waffles/4", "apple_pie/5"]}
    return {"food-101.tar.gz": {**{f"food-101/meta/{split}.txt": text(*own) for split, own in lines.items()},
                                **{f"food-101/images/{line}.jpg": jpg(i) for i, line in enumerate(sum(lines.values(), []))}}}


def dtd() -> dict[str, Files]:
    own = {"train1": "zigzagged/zigzagged_1.jpg", "val1": "banded/banded_2.jpg", "test1": "zigzagged/zigzagged_3.jpg",
           "test2": "banded/banded_9.jpg"}
    both = {name: (line, "banded/banded_" + str(i) + "0.jpg") for i, (name, line) in enumerate(own.items())}
    images = {line: jpg(i) for i, line in enumerate(line for lines in both.values() for line in lines)}
    return {"dtd-r1.0.1.tar.gz": {**{f"dtd/labels/{name}.txt": text(*lines) for name, lines in both.items()},
                                  **{f"dtd/images/{line}": data for line, data in images.items()}}}


def sun() -> dict[str, Files]:
    classes = ["/a/abbey", "/a/apartment_building/outdoor", "/b/bar"]
    images = {f"{name}/sun_{n}.jpg": jpg(10 * i + n) for i, name in enumerate(classes) for n in (1, 2)}
    return {"Partitions.zip": {"ClassName.txt": text(*classes),
                               "Training_01.txt": text(*(p for p in images if "_1" in p)),
                               "Testing_01.txt": text(*(p for p in images if "_2" in p)), "Testing_02.txt": text("/x")},
            "SUN397.tar.gz": {f"SUN397{path}": data for path, data in images.items()}}


def flowers() -> dict[str, Files]:
    labels = np.array([[77, 1, 102, 77, 5, 1]])
    return {"": {"imagelabels.mat": mat(labels=labels),
                 "setid.mat": mat(trnid=np.array([[1, 2]]), valid=np.array([[3]]), tstid=np.array([[6, 4, 5]]))},
            "102flowers.tgz": {f"jpg/image_{i:05d}.jpg": jpg(i) for i in range(1, 7)}}


def cars() -> dict[str, Files]:
    def annotations(rows: list[tuple[str, int]]) -> bytes:
        return mat(annotations=records([{"bbox_x1": 1, "class": label, "fname": name} for name, label in rows]))

    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], object)
    return {"car_devkit.tgz": {"devkit/cars_meta.mat": mat(class_names=names),
                               "devkit/cars_train_annos.mat": annotations([("00001.jpg", 2), ("00002.jpg", 1)])},
            "": {"cars_test_annos_withlabels.mat": annotations([("00001.jpg", 1), ("00002.jpg", 2)])},
            "cars_train.tgz": {"cars_train/00001.jpg": jpg(1), "cars_train/00002.jpg": jpg(2)},
            "cars_test.tgz": {"cars_test/00001.jpg": jpg(3), "cars_test/00002.jpg": jpg(4)}}


def aircraft() -> dict[str, Files]:
    of = {"train": ["0001 A300B4", "0002 707-320"], "val": ["0003 A300B4"], "test": ["0004 707-320", "0005 A300B4"]}
    return {"fgvc-aircraft-2013b.tar.gz": {
        "fgvc-aircraft-2013b/data/variants.txt": text("707-320", "A300B4"),
        **{f"fgvc-aircraft-2013b/data/images_variant_{split}.txt": text(*lines) for split, lines in of.items()},
        **{f"fgvc-aircraft-2013b/data/images/{line.split()[0]}.jpg": jpg(int(line[:4])) for line in sum(of.values(), [])}}}


def caltech() -> dict[str, Files]:
    inner = {f"101_ObjectCategories/{folder}/image_{n:04d}.jpg": jpg(n + 100 * i)
             for i, folder in enumerate(("BACKGROUND_Google", "Faces", "accordion")) for n in range(1, 33)}
    return {"caltech-101.zip": {"caltech-101/101_ObjectCategories.tar.gz": packed(inner, ".tar.gz"),
                                "__MACOSX/caltech-101/._x": b"x"}}


def imagenet() -> dict[str, Files]:
    synsets = records([{"ILSVRC2012_ID": 1, "WNID": "n02", "words": "tabby, cat", "num_children": 0},
                       {"ILSVRC2012_ID": 2, "WNID": "n01", "words": "tench", "num_children": 0},
                       {"ILSVRC2012_ID": 3, "WNID": "n00", "words": "animal", "num_children": 2}])
    return {"ILSVRC2012_devkit_t12.tar.gz": {
        "ILSVRC2012_devkit_t12/data/meta.mat": mat(synsets=synsets),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": text("1", "2", "2")},
        "ILSVRC2012_img_val.tar": {f"ILSVRC2012_val_{i:08d}.JPEG": jpg(i) for i in (1, 2, 3)}}


def cifar(name: str, batches: list[str], meta: str, label: bytes, names: bytes) -> Callable[[], dict[str, Files]]:
    def made() -> dict[str, Files]:
        folder = f"cifar-{name[5:]}-" + ("batches-py" if name == "cifar10" else "python")
        files = {f"{folder}/{batch}": pickle.dumps({b"data": pixels(i), label: [1, 0]}) for i, batch in enumerate(batches)}
        return {f"cifar-{name[5:]}-python.tar.gz": files | {
            f"{folder}/{meta}": pickle.dumps({names: [b"airplane", b"aquarium_fish"]})}}

    return made


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (2, 3072), np.uint8)


def karpathy(name: str, folder: str) -> Callable[[], dict[str, Files]]:
    def made() -> dict[str, Files]:
        images = [{"filename": f"{i}.jpg", "split": split, "filepath": folder,
                   "sentences": [{"raw": f"Caption {k} of {i}."} for k in range(4 + i)]}
                  for i, split in enumerate(("train", "restval", "val", "test"))]
        return {"": {f"dataset_{name}.json": json.dumps({"images": images}).encode()},
                f"{folder}.zip": {f"{folder}/{i}.jpg": jpg(i) for i in range(4)}}

    return made


MINIATURES: dict[str, Callable[[], dict[str, Files]]] = {
    "pets": pets, "food101": food, "dtd": dtd, "sun397": sun, "flowers102": flowers, "cars": cars, "aircraft": aircraft,
    "caltech101": caltech, "imagenet1k": imagenet, "flickr30k": karpathy("flickr30k", "flickr30k-images"),
    "coco": karpathy("coco", "val2014"),
    "cifar10": cifar("cifar10", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "batches.meta", b"labels",
                     b"label_names"),
    "cifar100": cifar("cifar100", ["train", "test"], "meta", b"fine_labels", b"fine_label_names")}

# What must come out: split → labels (or numbers of captions) in any order.
LABELS = {"food101": {"train": [0, 0, 1], "test": [0, 1]},
          "dtd": {"train": [0, 1], "validation": [0, 0], "test": [0, 1]},
          "sun397": {"train": [0, 1, 2], "test": [0, 1, 2]},
          "flowers102": {"train": [0, 76], "validation": [101], "test": [0, 4, 76]},
          "cars": {"train": [0, 1], "test": [0, 1]},
          "aircraft": {"train": [0, 1], "validation": [1], "test": [0, 1]}, "imagenet1k": {"test": [0, 0, 1]},
          "caltech101": {"train": [0] * 30 + [1] * 30 + [2] * 30, "test": [0, 0, 1, 1, 2, 2]},
          "cifar10": {"train": [0, 1] * 5, "test": [0, 1]}, "cifar100": {"train": [0, 1], "test": [0, 1]},
          "pets": {"train": list(range(37)), "test": list(range(37))},
          "flickr30k": {"train": [4, 5], "validation": [6], "test": [7]},
          "coco": {"validation": [6], "test": [7]}}
NAMES = {"food101": ("apple pie", "waffles"), "sun397": ("abbey", "outdoor apartment building", "bar"),
         "cars": ("AM General Hummer SUV 2000", "Acura RL Sedan 2012"), "aircraft": ("707-320", "A300B4"),
         "imagenet1k": ("tench", "tabby"), "caltech101": ("BACKGROUND Google", "Faces", "accordion"),
         "cifar100": ("airplane", "aquarium fish"), "dtd": ("banded", "zigzagged"), "coco": (), "flickr30k": ()}


def packed(files: Files, ending: str) -> bytes:
    stream = io.BytesIO()
    if ending == ".zip":
        with zipfile.ZipFile(stream, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=stream, mode="w" if ending == ".tar" else "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def put(folder: Path, archives: dict[str, Files], unpack: bool) -> Path:
    """The miniature as it is downloaded, or as it lies there once unpacked."""
    for archive, files in archives.items():
        if archive and not unpack:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / archive).write_bytes(packed(files, archive[archive.index(".", len(archive) - 7):]))
        for name, data in files.items() if unpack or not archive else ():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("unpack", [False, True], ids=["packed", "unpacked"])
@pytest.mark.parametrize("name", MINIATURES)
def test_every_archive_layout_becomes_a_set(name: str, unpack: bool, tmp_path: Path) -> None:
    archives = MINIATURES[name]()
    written = convert(name, put(tmp_path / "source", archives, unpack), tmp_path / name)
    assert written == {split: len(labels) for split, labels in LABELS[name].items()}
    originals = {data for files in archives.values() for data in files.values()}
    for split, expected in LABELS[name].items():
        evalset = open_evalset(tmp_path / name, split)
        found = [(image, target if isinstance(target, int) else len(target)) for _, image, target in evalset.examples()]
        assert sorted(target for _, target in found) == sorted(expected)
        if name not in ("cifar10", "cifar100", "caltech101"):
            assert {image for image, _ in found} <= originals  # bytes as they were
        assert evalset.templates == templates(name) and evalset.kind == CATALOGUE[name].kind
        assert evalset.classnames == NAMES.get(name, evalset.classnames)


def test_labels_go_with_pictures_not_with_their_order(tmp_path: Path) -> None:
    archives = flowers()
    convert("flowers102", put(tmp_path / "source", archives, False), tmp_path / "set")
    label_of = {image: label for _, image, label in open_evalset(tmp_path / "set").examples()}
    jpgs = archives["102flowers.tgz"]
    assert [label_of[jpgs[f"jpg/image_{i:05d}.jpg"]] for i in (4, 5, 6)] == [76, 4, 0]
    assert open_evalset(tmp_path / "set").classnames[76] == "passion flower"  # published: 77 of imagelabels.mat


def test_cifar_pixels_are_kept(tmp_path: Path) -> None:
    convert("cifar100", put(tmp_path / "source", MINIATURES["cifar100"](), False), tmp_path / "set", ("test",))
    (_, image, label), _ = open_evalset(tmp_path / "set").examples()
    original = pixels(1)[0].reshape(3, 32, 32).transpose(1, 2, 0)
    assert label == 1 and (np.asarray(Image.open(io.BytesIO(image))) == original).all()


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return shutil.rmtree, (str(tmp_path / "precious"),)

    (tmp_path / "precious").mkdir()
    archives = MINIATURES["cifar100"]()
    archives["cifar-100-python.tar.gz"]["cifar-100-python/meta"] = pickle.dumps(Evil())
    with pytest.raises(InputError, match="asks for shutil.rmtree"):
        convert("cifar100", put(tmp_path / "source", archives, False), tmp_path / "set")
    assert (tmp_path / "precious").exists()


def test_what_is_missing_or_foreign_is_named(tmp_path: Path) -> None:
    archives = food()
    archives["food-101.tar.gz"].pop("food-101/images/waffles/4.jpg")
    with pytest.raises(WorkFailed, match=r"1 of 2 images of food101, test, are missing, waffles/4\.jpg"):
        convert("food101", put(tmp_path / "a", archives, False), tmp_path / "food101", ("test",))
    assert not (tmp_path / "food101/test").exists()
    archives["food-101.tar.gz"].pop("food-101/meta/test.txt")
    with pytest.raises(InputError, match=r"has no meta/test\.txt: food101 is made from food-101\.tar\.gz"):
        convert("food101", put(tmp_path / "b", archives, False), tmp_path / "set")
    (tmp_path / "a/food-101.tar.gz").write_bytes(packed(archives["food-101.tar.gz"], ".tar.gz")[:200])
    with pytest.raises(InputError, match=r"food-101\.tar\.gz cannot be read"):
        convert("food101", tmp_path / "a", tmp_path / "set")
    other = pets()
    other["annotations.tar.gz"]["annotations/test.txt"] = text("Siamese_12 1 1 1")
    with pytest.raises(InputError, match="label 0 is 'Siamese' in the archive, 'Abyssinian' in the published order"):
        convert("pets", put(tmp_path / "c", other, False), tmp_path / "set")
    with pytest.raises(InputError, match="no set petz: known are pets"):
        convert("petz", tmp_path, tmp_path / "set")


def test_other_formats_become_png(tmp_path: Path) -> None:
    archives = food()
    archives["food-101.tar.gz"]["food-101/images/waffles/4.jpg"] = encoded(picture(1, 24, 16), "GIF")
    convert("food101", put(tmp_path / "source", archives, False), tmp_path / "set", ("test",))
    kinds = sorted(Image.open(io.BytesIO(image)).format or "" for _, image, _ in open_evalset(tmp_path / "set").examples())
    assert kinds == ["JPEG", "PNG"]


def test_names_of_folders_are_recognised() -> None:
    for folder, name in (("wds_vtab-flowers_test", "flowers102"), ("oxford_flowers102", "flowers102"), ("fgvc_aircraft",
                         "aircraft"), ("stanford-cars", "cars"), ("imagenet1k", "imagenet1k"), ("mscoco_captions", "coco"),
                         ("wds_cifar10", "cifar10"), ("vtab-cifar100", "cifar100"), ("oxford-iiit-pet", "pets"),
                         ("imagenet_sketch", None), ("imagenetv2", None), ("colour", None)):
        assert identify(folder) == name, folder
    assert len(CATALOGUE) == 13 and len(templates("imagenet1k")) == 80 and len(classnames("imagenet1k")) == 1000
    assert len(catalogue.templates("caltech101")) == 34 and all("{c}" in t for n in CATALOGUE for t in templates(n))
    assert official_order(classnames("pets")[::-1]) == list(classnames("pets")) and official_order(["a"]) is None


def test_check_finds_what_is_wrong(tmp_path: Path) -> None:
    names = list(classnames("flowers102"))
    names[0], names[5] = names[5], names[0]
    folder = tmp_path / "flowers"
    write_evalset(folder, "train", [(jpg(1), 0), (jpg(2), 1)], "classification", names, ["{c}"])
    write_evalset(folder, "test", [(jpg(2), 1), (jpg(3), 2), (jpg(3), 2), (jpg(4)[:200], 3)], "classification", names,
                  ["{c}"])
    found = check(folder)
    faults = "\n".join(found.faults)
    for words in ("1 undecodable images: s0000003", "1 images that are in another split too: s0000001 is s0000000 of test",
                  "train: 2 images; Flowers-102 has 1,020", "test: 4 images; Flowers-102 has 6,149",
                  "not in the published order: 2 of 102 lines differ, line 1 is 'tiger lily'"):
        assert words in faults, faults
    assert len(found.faults) == 5 and any("1 images are twice" in line for line in found.facts)
    assert any("99 classes have no image" in line for line in found.facts)
    clean = tmp_path / "mine"
    write_evalset(clean, "test", [(jpg(1), 0)], "classification", ["a"], ["{c}"])
    assert check(clean).faults == [] and "not in the catalogue" in check(clean).facts[0]
    pairs = tmp_path / "coco"
    write_evalset(pairs, "test", [(jpg(1), ["a", "b"])], "retrieval")
    assert [line.split(";")[0] for line in check(pairs).faults] == ["test: 1 images", "test: 2 captions"]


def test_torchvisions_sets_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 and Flowers-102 in miniature where torchvision looks for them, read by torchvision itself."""
    from torchvision.datasets import CIFAR10

    root, rng = tmp_path / "root", np.random.default_rng(0)
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    names = ["aeroplane", "cat_like", "ship"]
    batches = {name: {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [i % 3, 2, 0, 1]}
               for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"])}
    sums = {}
    for name, content in (batches | {"batches.meta": {"label_names": names}}).items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    with pytest.raises(InputError, match="holds no CIFAR10 that torchvision can read"):  # the sums are not the originals'
        from_torchvision("CIFAR10", root, tmp_path / "none")
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in batches if name != "test_batch"])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    assert from_torchvision("CIFAR10", root, tmp_path / "cifar10") == {"train": 20, "test": 4}
    evalset = open_evalset(tmp_path / "cifar10")
    assert evalset.classnames == ("aeroplane", "cat like", "ship") and evalset.templates == templates("cifar10")
    read = [(np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1).ravel(), label)
            for _, data, label in evalset.examples()]
    assert [label for _, label in read] == [2, 2, 0, 1]
    assert all((pixels == row).all() for (pixels, _), row in zip(read, batches["test_batch"]["data"], strict=True))
    several = {"setid.mat": mat(trnid=np.array([[1, 2]]), valid=np.array([[3, 4]]), tstid=np.array([[6, 5]]))}
    for name, data in [*(flower for files in flowers().values() for flower in files.items()), *several.items()]:
        (root / "flowers-102" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "flowers-102" / name).write_bytes(data)
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *words: True)
    ours, theirs = (tmp_path / name for name in ("ours", "flowers102"))
    counts = from_torchvision("Flowers102", root, theirs)
    assert counts == convert("flowers102", root / "flowers-102", ours)
    for split in counts:
        labels = [[label for *_, label in open_evalset(path, split).examples()] for path in (ours, theirs)]
        assert sorted(labels[0]) == sorted(labels[1])
    for name in ("Nothing", "CocoCaptions"):
        with pytest.raises(InputError, match=f"has no set {name} with splits"):
            from_torchvision(name, root, tmp_path / "x")


def zipped(change: Callable[[zipfile.ZipInfo], None], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip with the lists of Food-101, whose index says something else of one than its bytes do."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("food-101/meta/test.txt", "waffles/1\n" * 1_000)
        change(archive.infolist()[0])
    return stream.getvalue()


def nested(times: int) -> bytes:
    data = b"x"
    for _ in range(times):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("inner.zip", data)
        data = stream.getvalue()
    return data


def swollen() -> bytes:
    """A tar of 40 MB in 40 kB, of which nothing is asked for by name."""
    return packed({f"images/other/{n}.txt": bytes(1 << 20) for n in range(40)}, ".tar.gz")


def torn(data: bytes) -> bytes:
    """The same zip with another byte where the member's deflated bytes begin."""
    at = 30 + len("food-101/meta/test.txt")
    return data[:at] + b"\x07" + data[at + 1:]


@pytest.mark.parametrize(("archive", "data", "says"), [
    ("a.zip", lambda: nested(1_200), r"archives in archives, 3 deep: this is not the original"),
    ("a.zip", lambda: zipped(lambda info: setattr(info, "file_size", 6 << 30)), "unpacked: this is not the original"),
    ("a.zip", lambda: zipped(lambda info: setattr(info, "file_size", 5 << 20)), r"test\.txt has 5,242,880 bytes when unpacked"),
    ("a.tar.gz", swollen, "more than 100 times the archive's size is unpacked: this is not the original"),
    ("a.zip", lambda: zipped(lambda info: setattr(info, "flag_bits", 2049)), "test.txt cannot be read .*encrypted"),
    ("a.zip", lambda: torn(zipped(lambda info: None)), r"test\.txt cannot be read .*: fetch it again"),
])
def test_bombs_and_broken_members_are_refused_by_name(tmp_path, monkeypatch, archive, data, says):
    monkeypatch.setattr("evaluation.archives._MEMBER_BYTES", 4 << 20)  # a hundredth of what it is, so that bombs may be small
    monkeypatch.setattr("evaluation.archives._AT_LEAST", 8 << 20)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / archive).write_bytes(data())
    with pytest.raises(InputError, match=says) as caught:
        convert("food101", tmp_path / "source", tmp_path / "set")
    assert archive in str(caught.value) and not (tmp_path / "set").exists()


@pytest.mark.parametrize("content", [b"no pickle", pickle.dumps([1]), pickle.dumps({b"data": np.zeros((2, 5), np.uint8)}),
                                     pickle.dumps({b"data": pixels(0), b"fine_labels": [1]})])
def test_a_batch_that_is_none_is_named(tmp_path, content):
    archives = MINIATURES["cifar100"]()
    archives["cifar-100-python.tar.gz"]["cifar-100-python/test"] = content
    with pytest.raises(InputError, match="test is not the original .*: fetch it again"):
        convert("cifar100", put(tmp_path / "source", archives, False), tmp_path / "set", ("test",))


def test_lists_that_are_none_are_named(tmp_path):
    archives = flowers()
    next(files for files in archives.values() if "imagelabels.mat" in files)["imagelabels.mat"] = b"<html>"
    with pytest.raises(InputError, match=r"imagelabels\.mat.* is not the original .*: fetch it again"):
        convert("flowers102", put(tmp_path / "source", archives, False), tmp_path / "set")

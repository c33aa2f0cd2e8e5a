"""Image data: folders decoded once or streamed, broken data, and the views of workers."""

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from common import image_folder, images

CPU = torch.device("cpu")


def copy_of(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    return tmp_path / "data"


def test_a_folder_is_decoded_once_and_equals_its_pictures(pictures, tmp_path, monkeypatch):
    data = copy_of(pictures, tmp_path)
    found = images.load("folder", data, 32, CPU)
    assert found.train.shape == (48, 3, 32, 32) and found.train.dtype == torch.uint8 and found.classes == 2
    assert sorted(found.train_labels.tolist()) == [0] * 24 + [1] * 24 and len(found.test) == 16
    folder = image_folder.open_folder(data / "train")
    transform = v2.Compose([v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor()])
    for i in (0, 30):
        assert torch.equal(found.train[i], transform(folder[i][0]))
    monkeypatch.setattr(image_folder, "Decoded", None)  # a second load must not decode
    again = images.load("folder", data, 32, CPU)
    assert torch.equal(again.train, found.train) and again.digest == found.digest
    scaled = found.train.double() / 255
    torch.testing.assert_close(found.mean.flatten().double(), scaled.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        found.std.flatten().double(), scaled.std((0, 2, 3), correction=0), atol=1e-6, rtol=0
    )
    normalised = found.normalise(found.train)
    assert normalised.mean().abs() < 1e-5 and (normalised.std() - 1).abs() < 1e-3


def test_an_interrupted_decoding_goes_on_where_its_file_ends(pictures, tmp_path, monkeypatch):
    data = copy_of(pictures, tmp_path)
    for number in range(300):
        shutil.copy(data / "train/red/0.png", data / f"train/red/more{number}.png")
    whole, _ = image_folder.resident(data / "train", 32, data, 0, "a")
    path, bytes_before = data / "train-32-a.npy", (data / "train-32-a.npy").read_bytes()
    path.unlink()
    path.with_suffix(".part").write_bytes(bytes_before[: 128 + 280 * 3072 + 7])  # 280 pictures and a bit
    read = []
    monkeypatch.setattr(
        image_folder, "read", lambda folder, index, old=image_folder.read: read.append(index) or old(folder, index)
    )
    again, _ = image_folder.resident(data / "train", 32, data, 0, "a")
    assert torch.equal(again, whole) and read == list(range(256, 348))
    assert path.read_bytes() == bytes_before and not path.with_suffix(".part").exists()


def test_train_and_val_must_hold_the_same_classes(pictures, tmp_path, capsys):
    data = copy_of(pictures, tmp_path)
    shutil.rmtree(data / "val/red")
    with pytest.raises(SystemExit):
        images.load("folder", data, 32, CPU)
    assert "only one has ['red']" in capsys.readouterr().err


def test_a_changed_folder_has_another_digest(pictures, tmp_path):
    data = copy_of(pictures, tmp_path)
    before = image_folder.digest(data)
    Image.new("RGB", (40, 36)).save(data / "train/red/new.png")
    assert image_folder.digest(data) != before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(workers, pictures, tmp_path, capsys):
    data = copy_of(pictures, tmp_path)
    (data / "train/red/3.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as end:
        images.load("folder", data, 32, CPU, workers)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "red/3.png cannot be decoded" in printed and printed.count("\n") == 1


def test_glyphs_are_cached_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "GLYPHS", {"train": 60, "test": 20})
    first = images.load("glyphs10", tmp_path, 32, CPU)
    path = tmp_path / "glyphs10-train-60.pt"
    assert path.exists() and first.classes == 10 and len(first.test) == 20
    path.write_bytes(path.read_bytes()[:100])
    assert images.load("glyphs10", tmp_path, 32, CPU).digest == first.digest
    blocked = tmp_path / "a file"
    blocked.write_text("")
    assert images.load("glyphs10", blocked / "below", 32, CPU).digest == first.digest


def test_the_views_of_workers_follow_from_seed_epoch_and_index_alone(pictures):
    transform = v2.Compose([v2.RandomResizedCrop(24), v2.PILToTensor()])
    orders = [[3, 1], [0, 40]]

    def views(workers, seed=0, epoch=0, order=orders):
        data = image_folder.StreamedImages(pictures, 24, workers, CPU)
        return list(data.views(transform, 2, order, seed, epoch))

    alone, shared = views(0), views(2)
    for a, b in zip(alone, shared, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert alone[0][0].shape == (2, 3, 24, 24) and not torch.equal(alone[0][0], alone[0][1])
    assert torch.equal(views(0, order=[[0, 1]])[0][1][1], alone[0][1][1])
    for other in (views(0, seed=1), views(0, epoch=1)):
        assert not torch.equal(other[0][0], alone[0][0])
    state = torch.get_rng_state()
    views(0)
    assert torch.equal(state, torch.get_rng_state())


def test_a_damaged_decoded_file_is_named_and_an_unwritable_cache_too(pictures, tmp_path, capsys):
    data = copy_of(pictures, tmp_path)
    image_folder.resident(data / "train", 32, data, 0, "a")
    path = data / "train-32-a.npy"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SystemExit) as end:
        image_folder.resident(data / "train", 32, data, 0, "a")
    assert end.value.code == 2 and "remove it, and it is decoded again" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        image_folder.resident(data / "train", 32, Path("/proc/none"), 0, "a")
    assert end.value.code == 2 and "cannot be written to /proc/none" in capsys.readouterr().err


def test_half_extracted_cifar_is_never_trained_on(tmp_path, capsys):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "batches.meta"):
        (folder / name).write_bytes(b"half of what should be here")
    with pytest.raises(SystemExit) as end:
        images.load("cifar10", tmp_path, 32, CPU)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and "or damaged: python -m common.images cifar10" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("served", [True, False])
def test_a_download_that_fails_says_which_file_to_put_where(served, tmp_path, monkeypatch, capsys):
    """A page where the archive should be; and nobody there at all."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/cifar-10-python.tar.gz").write_text("<html>please log in</html>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        site = f"http://127.0.0.1:{server.server_port}"
        if served:
            threading.Thread(target=server.serve_forever).start()
        else:
            server.server_close()
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{site}/cifar-10-python.tar.gz")
        with pytest.raises(SystemExit) as end:
            images.main(["cifar10", "--data", str(tmp_path)])
        if served:
            server.shutdown()
    printed = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"put cifar-10-python.tar.gz into {tmp_path}" in printed


def test_few_pictures_are_a_fixed_draw_of_them(pictures, tmp_path):
    data = copy_of(pictures, tmp_path)
    whole = images.load("folder", data, 32, CPU)
    some, again = whole.subset(10), images.load("folder", data, 32, CPU).subset(10)
    assert some.examples == 10 and len(some.test) == 10 and torch.equal(some.train, again.train)
    assert set(some.train_labels.tolist()) == {0, 1} and whole.subset(1000).examples == 48
    streamed = image_folder.StreamedImages(data, 32, 0, CPU).subset(10)
    pixels, labels = next(streamed.batches("train"))
    assert streamed.examples == len(pixels) == 10 and torch.equal(labels, some.train_labels)

"""Image data: image folders (cached or streamed), glyphs, CIFAR, damaged files and downloads."""

import functools
import hashlib
import http.server
import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from common import files, glyphs, image_folder, images
from common.download import download

CPU = torch.device("cpu")


def copy_folder(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data", ignore=shutil.ignore_patterns("*.npy", "*.lock"))
    return tmp_path / "data"


def test_an_image_folder_is_decoded_once_and_the_cache_equals_the_images(pictures, tmp_path, monkeypatch):
    data = copy_folder(pictures, tmp_path)
    loaded = images.load("folder", data, 32, CPU)
    assert loaded.train.shape == (48, 3, 32, 32) and loaded.train.dtype == torch.uint8 and loaded.classes == 2
    assert sorted(loaded.train_labels.tolist()) == [0] * 24 + [1] * 24 and len(loaded.test) == 16
    folder = image_folder.open_folder(data / "train")
    transform = v2.Compose([v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor()])
    for i in (0, 30):
        assert torch.equal(loaded.train[i], transform(folder[i][0]))
    monkeypatch.setattr(image_folder, "TransformedImages", None)  # the second load must not decode
    again = images.load("folder", data, 32, CPU)
    assert torch.equal(again.train, loaded.train) and again.digest == loaded.digest
    scaled = loaded.train.double() / 255
    torch.testing.assert_close(loaded.mean.flatten().double(), scaled.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(loaded.std.flatten().double(), scaled.std((0, 2, 3), correction=0), atol=1e-6, rtol=0)
    normalised = loaded.normalise(loaded.train)
    assert normalised.mean().abs() < 1e-5 and (normalised.std() - 1).abs() < 1e-3


def test_interrupted_decoding_resumes_where_its_file_ends(pictures, tmp_path, monkeypatch):
    data = copy_folder(pictures, tmp_path)
    for number in range(300):
        shutil.copy(data / "train/red/0.png", data / f"train/red/more{number}.png")
    folder = image_folder.open_folder(data / "train")
    expected, _ = image_folder.load_cached(folder, "train", 32, data)
    (path,) = data.glob("train-32-*.npy")
    expected_bytes = path.read_bytes()
    path.unlink()
    path.with_suffix(".part").write_bytes(expected_bytes[: 128 + 280 * 3072 + 7])  # header, 280 images and 7 bytes
    real_open, opened = folder.loader, []

    def open_image(name):
        opened.append(name)
        return real_open(name)

    monkeypatch.setattr(folder, "loader", open_image)
    resumed, _ = image_folder.load_cached(folder, "train", 32, data)
    assert torch.equal(resumed, expected) and opened == [path for path, _ in folder.samples[256:]]
    assert path.read_bytes() == expected_bytes and not path.with_suffix(".part").exists()


def test_different_classes_in_train_and_val_are_an_error(pictures, tmp_path, capsys):
    data = copy_folder(pictures, tmp_path)
    shutil.rmtree(data / "val/red")
    with pytest.raises(SystemExit):
        images.load("folder", data, 32, CPU)
    assert "classes ['red'] are only in train or only in val" in capsys.readouterr().err


def replace_with_equal_size(path: Path) -> None:
    """Change the content of a file without changing its name, size or mtime."""
    size, status = path.stat().st_size, path.stat()
    Image.fromarray(255 - np.asarray(Image.open(path).convert("RGB"))).save(path, "bmp")
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (size, status.st_mtime_ns)


def convert_to_bitmaps(data: Path) -> None:
    """Convert all images of a folder to bitmaps, whose file size depends only on the image shape."""
    for path in data.glob("*/*/*.png"):
        Image.open(path).convert("RGB").save(path.with_suffix(".bmp"))
        path.unlink()


def test_images_replaced_by_others_of_equal_size_are_decoded_again(pictures, tmp_path):
    data = copy_folder(pictures, tmp_path)
    convert_to_bitmaps(data)
    before = images.load("folder", data, 32, CPU)
    for path in data.glob("train/*/*.bmp"):
        replace_with_equal_size(path)
    after = images.load("folder", data, 32, CPU)
    assert after.digest != before.digest and not torch.equal(after.train, before.train)
    assert torch.equal(after.test, before.test)


def test_the_digest_depends_on_the_content_not_on_the_path(pictures, tmp_path):
    data = copy_folder(pictures, tmp_path)
    shutil.copytree(data, tmp_path / "moved")
    for size in (32, 96):
        first, moved = (images.load_or_stream("folder", root, size, CPU, 0) for root in (data, tmp_path / "moved"))
        assert first.digest == moved.digest
    Image.new("RGB", (40, 36)).save(data / "train/red/new.png")
    assert images.load_or_stream("folder", data, 96, CPU, 0).digest != first.digest


def test_the_digest_of_streamed_images_changes_with_their_content(pictures, tmp_path):
    data = copy_folder(pictures, tmp_path)
    convert_to_bitmaps(data)
    before = images.load_or_stream("folder", data, 96, CPU, 0).digest
    replace_with_equal_size(next(data.glob("train/red/*.bmp")))
    assert images.load_or_stream("folder", data, 96, CPU, 0).digest != before


@pytest.mark.parametrize("size", [32, 96])
def test_ignored_files_are_counted_in_a_warning(size, pictures, tmp_path, capsys):
    data = copy_folder(pictures, tmp_path)
    expected = images.load_or_stream("folder", data, size, CPU, 0)
    capsys.readouterr()
    for name in ("a.gif", "b.GIF", "notes.txt"):
        (data / "train/red" / name).write_text("not read")
    (data / "train/.ipynb_checkpoints").mkdir()
    shutil.copy(data / "train/red/0.png", data / "train/.ipynb_checkpoints/0.png")
    shutil.copy(data / "train/red/0.png", data / "train/red/._0.png")
    loaded = images.load_or_stream("folder", data, size, CPU, 0)
    printed = capsys.readouterr().err
    assert printed.count("warning") == 1 and "5 files (.gif, hidden, .txt) ignored" in printed
    assert (loaded.examples, loaded.classes, loaded.digest) == (expected.examples, expected.classes, expected.digest)


@pytest.mark.parametrize("size", [32, 96])
def test_an_empty_class_and_a_broken_link_are_an_error(size, pictures, tmp_path, capsys):
    data = copy_folder(pictures, tmp_path)
    (data / "train/red/0.png").unlink()
    (data / "train/red/0.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(SystemExit) as end:
        images.load_or_stream("folder", data, size, CPU, 0)
    assert end.value.code == 2 and "red/0.png cannot be read" in capsys.readouterr().err
    (data / "train/empty").mkdir()
    with pytest.raises(SystemExit) as end:
        images.load_or_stream("folder", data, size, CPU, 0)
    assert end.value.code == 2 and "train/empty has no image" in capsys.readouterr().err


@pytest.mark.parametrize("size", [32, 96])
def test_16_bit_and_constant_images_are_an_error(size, pictures, tmp_path, capsys):
    """16-bit pixels would be clipped to white, and a constant data set would look like a collapse."""
    data = copy_folder(pictures, tmp_path)
    pixels = np.linspace(20000, 40000, 1200).astype(np.uint16).reshape(30, 40)
    Image.fromarray(pixels).save(data / "train/blue/0.png")
    with pytest.raises(SystemExit) as end:
        images.load_or_stream("folder", data, size, CPU, 0)
    assert end.value.code == 2 and "blue/0.png has more than 8 bits" in capsys.readouterr().err
    for path in data.glob("*/*/*.png"):
        Image.new("RGB", (40, 36), (77, 77, 77)).save(path)
    with pytest.raises(SystemExit) as end:
        images.load_or_stream("folder", data, size, CPU, 0)
    assert end.value.code == 2 and "are equal: give images that are not constant" in capsys.readouterr().err


def test_channel_statistics_equal_mean_and_std_of_the_scaled_pixels():
    pixels = torch.randint(0, 256, (5000, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    pixels[:, 1] //= 7
    mean, std = images.channel_statistics(pixels)
    scaled = pixels.double() / 255
    torch.testing.assert_close(mean.flatten(), scaled.mean((0, 2, 3)).float())
    torch.testing.assert_close(std.flatten(), scaled.std((0, 2, 3), correction=0).float())


def test_a_constant_channel_has_a_standard_deviation_of_exactly_zero():
    """Rounding leaves many constants a tiny variance, by which pixels would be divided."""
    for value in range(256):
        pixels = torch.full((5, 3, 7, 7), value, dtype=torch.uint8)
        pixels[0, 0, 0, 0] = 255 - value
        std = images.channel_statistics(pixels)[1].flatten()
        assert std[0] > 0 and std[1] == std[2] == 0, value


def test_a_constant_channel_is_not_divided_by_zero(pictures, tmp_path, capsys):
    data = copy_folder(pictures, tmp_path)
    for path in data.glob("*/*/*.png"):
        pixels = np.array(Image.open(path).convert("RGB"))
        pixels[..., 2] = 77
        Image.fromarray(pixels).save(path)
    loaded = images.load("folder", data, 32, CPU)
    assert loaded.std.flatten()[2] == 1 and loaded.normalise(loaded.train).isfinite().all()
    assert "channel blue is constant" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["glyphs10", "cifar10"])
def test_an_image_folder_with_another_data_set_is_an_error(name, pictures, tmp_path, capsys):
    data = copy_folder(pictures, tmp_path)
    before = sorted(data.rglob("*"))
    for folder in (data, data / "train", data / "train/red"):
        with pytest.raises(SystemExit) as end:
            images.load_or_stream(name, folder, 32, CPU, 0)
        assert end.value.code == 2 and "train with --data-set folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        images.main(["cifar10", "--data", str(data)])
    assert end.value.code == 2 and sorted(data.rglob("*")) == before
    with pytest.raises(SystemExit) as end:
        images.load(name, data / "train/red/0.png", 32, CPU)
    assert end.value.code == 2 and "0.png is a file: give a folder" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_for_an_undecodable_image_names_the_file(workers, pictures, tmp_path, capsys):
    data = copy_folder(pictures, tmp_path)
    (data / "train/red/3.png").write_bytes(b"not an image")
    with pytest.raises(SystemExit) as end:
        images.load("folder", data, 32, CPU, workers)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1
    assert "error: --data: image " in printed and "red/3.png cannot be decoded (unknown image format)" in printed


def test_a_damaged_or_unwritable_glyph_cache_is_not_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "GLYPH_COUNTS", {"train": 60, "test": 20})
    first = images.load("glyphs10", tmp_path, 32, CPU)
    (path,) = tmp_path.glob("glyphs10-train-60-*.pt")
    assert first.classes == 10 and len(first.test) == 20
    path.write_bytes(path.read_bytes()[:100])
    assert images.load("glyphs10", tmp_path, 32, CPU).digest == first.digest
    blocked = tmp_path / "a file"
    blocked.write_text("")
    assert images.load("glyphs10", blocked / "below", 32, CPU).digest == first.digest


def test_the_glyph_cache_of_other_code_or_fonts_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "GLYPH_COUNTS", {"train": 60, "test": 20})
    images.load("glyphs10", tmp_path, 32, CPU)
    before = set(tmp_path.glob("*.pt"))
    monkeypatch.setattr(glyphs, "fingerprint", lambda: "0123456789abcdef")
    images.load("glyphs10", tmp_path, 32, CPU)
    assert len(before) == 2 and len(set(tmp_path.glob("*.pt")) - before) == 2


def test_streamed_views_depend_only_on_seed_epoch_and_index(pictures):
    transform = v2.Compose([v2.RandomResizedCrop(24), v2.PILToTensor()])

    def views(workers, seed=0, epoch=0, batches=((3, 1), (0, 40))):
        data = image_folder.StreamedImages(pictures, 24, workers, CPU)
        return list(data.views(transform, 2, list(map(list, batches)), seed, epoch))

    without_workers, with_workers = views(0), views(2)
    for a, b in zip(without_workers, with_workers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    first, second = without_workers[0]
    assert first.shape == (2, 3, 24, 24) and not torch.equal(first, second)
    assert torch.equal(views(0, batches=[[0, 1]])[0][1][1], second[1])
    for other in (views(0, seed=1), views(0, epoch=1)):
        assert not torch.equal(other[0][0], first)
    state = torch.get_rng_state()
    views(0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("damage", ["cut", "empty", "another type", "another shape"])
def test_a_damaged_image_cache_is_an_error(damage, pictures, tmp_path, capsys):
    data = copy_folder(pictures, tmp_path)
    folder = image_folder.open_folder(data / "train")
    pixels, _ = image_folder.load_cached(folder, "train", 32, data)
    (path,) = data.glob("train-32-*.npy")
    if damage in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 5000 if damage == "cut" else 0])
    else:
        np.save(path, pixels.float().numpy() if damage == "another type" else pixels[1:].numpy())
    with pytest.raises(SystemExit) as end:
        image_folder.load_cached(folder, "train", 32, data)
    assert end.value.code == 2 and "delete it to decode the images again" in capsys.readouterr().err


def test_an_unwritable_image_cache_is_an_error(pictures, tmp_path, capsys):
    folder = image_folder.open_folder(pictures / "train")
    with pytest.raises(SystemExit) as end:
        image_folder.load_cached(folder, "train", 32, Path("/proc/none"))
    assert (
        end.value.code == 2 and "error: --data /proc/none: image cache /proc/none/train-32-" in capsys.readouterr().err
    )


def test_partly_extracted_cifar_is_an_error(tmp_path, capsys):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "batches.meta"):
        (folder / name).write_bytes(b"part of the file")
    with pytest.raises(SystemExit) as end:
        images.load("cifar10", tmp_path, 32, CPU)
    printed = capsys.readouterr().err
    assert (
        end.value.code == 2
        and f"missing or damaged in {tmp_path}: run python -m common.images cifar10" in printed
        and printed.count("\n") == 1
    )


@pytest.mark.parametrize("served", [True, False])
def test_the_error_for_a_failed_download_names_the_archive_and_its_folder(served, tmp_path, capsys):
    """The server returns a web page instead of the archive, or there is no server."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/cifar-10-python.tar.gz").write_text("<html>please log in</html>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        site = f"http://127.0.0.1:{server.server_port}"
        if served:
            threading.Thread(target=server.serve_forever).start()
        else:
            server.server_close()
        with pytest.raises(SystemExit) as end:
            images.main(["cifar10", "--data", str(tmp_path), "--mirror", f"{site}/"])
        if served:
            server.shutdown()
    printed = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"put cifar-10-python.tar.gz into {tmp_path}" in printed


@pytest.mark.parametrize(("ranges", "starts"), [(True, [0, 1000, 0]), (False, [0, 0, 0])])
def test_a_cut_download_continues_if_the_server_can(ranges, starts, tmp_path):
    content, asked = bytes(range(256)) * 20, []

    class Handler(http.server.BaseHTTPRequestHandler):
        """The first answer is cut after 1,000 bytes."""

        def do_GET(self):
            given = self.headers["Range"] if ranges else None
            asked.append(int(given.removeprefix("bytes=").rstrip("-")) if given else 0)
            self.send_response(206 if given else 200)
            self.send_header("Content-Length", str(len(content) - asked[-1]))
            self.end_headers()
            self.wfile.write(content[asked[-1] : 1000 if len(asked) == 1 else None])

        def log_message(self, *_):
            pass

    path, md5 = tmp_path / "archive.tar.gz", hashlib.md5(content).hexdigest()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/archive.tar.gz"
        with pytest.raises(OSError, match="cut after 1000 of 5120 bytes"):
            download(url, path, md5)
        assert not path.exists()
        download(url, path, md5)
        with pytest.raises(files.DamagedFile, match="is not the expected file"):
            download(url, tmp_path / "other", "0" * 32)
        with pytest.raises(OSError, match="InvalidURL"):
            download(f"{url} x", tmp_path / "other", md5)
        server.shutdown()
    assert path.read_bytes() == content and os.listdir(tmp_path) == [path.name] and asked == starts


def test_a_complete_data_set_is_not_downloaded_and_a_mirror_without_use_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "downloaded", lambda name, data: True)
    monkeypatch.setattr(images, "download", None)  # a call would fail
    images.main(["cifar10", "--data", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        images.main(["mnist5k", "--mirror", "http://x", "--data", str(tmp_path)])
    assert end.value.code == 2 and "--mirror applies to cifar10" in capsys.readouterr().err


def test_workers_with_a_long_temporary_folder_are_refused(pictures, tmp_path, monkeypatch, capsys):
    """Their sockets would have too long an address, and the run would wait for ever."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 20)))
    folder = image_folder.open_folder(pictures / "train")
    with pytest.raises(SystemExit) as end:
        next(image_folder.load_batches(folder, [[0]], 1, CPU))
    assert end.value.code == 2 and "set TMPDIR to a path of at most 75 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_test_views_are_resized_with_the_given_interpolation(interpolation, pictures):
    data = images.load_or_stream("folder", pictures, 96, CPU, 0, interpolation=interpolation)
    image, _ = data.test[5]
    view = v2.functional.resize(image, [110], v2.InterpolationMode(interpolation))
    expected = v2.functional.pil_to_tensor(v2.functional.center_crop(view, [96]))
    torch.testing.assert_close(next(data.batches("test", 2, 3))[0][1], data.normalise(expected))


def test_a_subset_is_fixed_and_equal_for_cached_and_streamed_images(pictures, tmp_path):
    data = copy_folder(pictures, tmp_path)
    full = images.load("folder", data, 32, CPU)
    subset, again = full.subset(10), images.load("folder", data, 32, CPU).subset(10)
    assert subset.examples == 10 and len(subset.test) == 10 and torch.equal(subset.train, again.train)
    assert set(subset.train_labels.tolist()) == {0, 1} and full.subset(1000).examples == 48
    all_streamed = image_folder.StreamedImages(data, 32, 0, CPU)
    streamed = all_streamed.subset(10)
    assert all_streamed.examples == len(all_streamed.train) == 48  # subset returns a copy
    pixels, labels = next(streamed.batches("train"))
    assert streamed.examples == len(pixels) == 10 and torch.equal(labels, subset.train_labels)

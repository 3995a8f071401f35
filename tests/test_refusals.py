"""What a stage refuses: one line that names the key, file or image; exit code 1; finished outputs as they were."""

import errno
import gc
import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STAGES, Project, make_images
from safetensors.torch import save_file
from torch.hub import get_dir

from stages.common.cli import _Interrupt
from stages.network import objective
from stages.network.weights import METADATA_KEY

# Images are read where nothing is kept of them.
pytestmark = pytest.mark.usefixtures("cold_cache")

Refusal = Callable[[Project, str], str]


def snapshot(project: Project) -> dict[Path, bytes]:
    folders = (project.path("data"), project.path("metrics"))
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def built(project: Project) -> Project:
    project.build()
    return project


@pytest.mark.parametrize(
    ("key", "value", "stage", "message"),
    [
        ("data.path", "nowhere", "split", "data.path: nowhere does not exist"),
        ("data.path", "params.yaml", "split", "data.path: params.yaml is not a folder"),
        ("data.path", "empty", "split", "data.path: empty holds no folders"),
        (
            "model.arch",
            "efficientnet_b",
            "build_model",
            "model.arch: 'efficientnet_b' is no classifier of torchvision's; did you mean efficientnet_b",
        ),
        (
            "model.weights",
            "IMAGENET1K_V3",
            "build_model",
            "model.weights: mobilenet_v3_small has no weights named 'IMAGENET1K_V3'; did you mean IMAGENET1K_V1",
        ),
        pytest.param(
            "device",
            "cuda",
            "train_head",
            "device: cuda is not on this machine",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
        ),
    ],
)
def test_a_missing_thing_is_named_and_nothing_is_lost(
    built: Project, refusal: Refusal, key: str, value: str, stage: str, message: str
) -> None:
    built.path("empty").mkdir()
    before = snapshot(built)
    built.set(key, value)
    assert message in refusal(built, stage)
    assert snapshot(built) == before


def test_an_empty_class_folder_and_a_single_class_are_refused(project: Project, refusal: Refusal) -> None:
    project.path("images/owl").mkdir()
    assert "data.path: no images in images/owl" in refusal(project, "split")
    for name in ("dog", "owl"):
        shutil.rmtree(project.path(f"images/{name}"))
    assert "data.path: images holds one class only (cat)" in refusal(project, "split")


def test_an_unreadable_class_folder_is_refused(
    project: Project, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir

    def refuse(path: Path) -> list[str]:
        if Path(path).name == "dog":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert "data.path: images/dog: permission denied; make it readable" in refusal(project, "split")


@pytest.mark.parametrize(("count", "val_size"), [(2, 0.1), (1, 0)])
def test_a_class_too_small_to_split_is_refused(project: Project, refusal: Refusal, count: int, val_size: float) -> None:
    project.set("split.val_size", val_size)
    make_images(project.path("images"), ("cat", "dog", "owl"))
    for path in sorted(project.path("images/owl").iterdir())[count:]:
        path.unlink()
    assert f"class 'owl' is too small to split: {count} different images" in refusal(project, "split")


def test_a_class_whose_images_are_all_bad_is_refused(project: Project, refusal: Refusal) -> None:
    for path in project.path("images/dog").iterdir():
        path.write_bytes(b"")
    assert "all 20 images of class 'dog' are bad, such as 'dog/000.png' (empty file)" in refusal(project, "split")


def test_more_bad_files_than_the_limit_are_refused(project: Project, refusal: Refusal) -> None:
    project.path("images/dog/000.png").write_bytes(b"")
    project.path("images/dog/001.png").write_bytes(b"")
    assert project.run("split") == 0  # 2 of 40 are the limit of 5%
    before = snapshot(project)
    project.path("images/dog/002.png").write_bytes(b"")
    assert "split.rejected_limit: 3 of 40 files are bad (7.5%, the limit is 5.0%)" in refusal(project, "split")
    assert snapshot(project) == before


def test_unfreeze_beyond_the_network_is_refused_before_the_head_is_trained(built: Project, refusal: Refusal) -> None:
    before = snapshot(built)
    built.set("finetune.unfreeze", 99)
    message = "finetune.unfreeze: should be from 0 to 13, the blocks of this network, is 99"
    assert message in refusal(built, "build_model")
    assert snapshot(built) == before
    shutil.copy(built.checkpoint("initial"), built.checkpoint("head"))
    assert message in refusal(built, "finetune")


def test_weights_that_cannot_be_downloaded_are_refused_with_the_way_out(
    built: Project, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    built.set("model.weights", "DEFAULT")
    line = refusal(built, "build_model")
    assert "model.weights: cannot download DEFAULT from https://download.pytorch.org/models/mobilenet_v3_small" in line
    assert "give its path as model.weights" in line


def test_named_weights_that_were_downloaded_before_are_used(
    built: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    entry = MobileNet_V3_Small_Weights.IMAGENET1K_V1
    file = Path(get_dir()) / "checkpoints" / Path(entry.url).name
    file.parent.mkdir(parents=True)
    torch.save(mobilenet_v3_small().state_dict(), file)
    built.set("model.weights", "IMAGENET1K_V1")
    built.set("model.image_size", None)
    assert built.run("build_model") == 0
    assert "weights IMAGENET1K_V1, 224 px" in capsys.readouterr().out


class _Code:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def _whole(path: Path) -> None:
    from torchvision.models import mobilenet_v3_small

    torch.save(mobilenet_v3_small().state_dict(), path)


def _truncated(path: Path) -> None:
    _whole(path)
    path.write_bytes(path.read_bytes()[:100_000])


def _with_code(path: Path) -> None:
    torch.save({"features.0.0.weight": _Code()}, path)


def _plain_pickle_with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Code(), protocol=2))


def _other_architecture(path: Path) -> None:
    from torchvision.models import mobilenet_v2

    torch.save(mobilenet_v2().state_dict(), path)


def _not_a_dictionary(path: Path) -> None:
    torch.save(torch.zeros(3), path)


def _nested(path: Path) -> None:
    torch.save({"networks": {"state_dict": {"features.0.0.weight": torch.zeros(3)}}}, path)


@pytest.mark.parametrize(
    ("write", "name", "message"),
    [
        (None, "missing.pth", "No such file or directory"),
        (Path.mkdir, "folder.pth", "Is a directory"),
        (_truncated, "weights.pth", "is damaged"),
        (_truncated, "weights.safetensors", "is damaged"),
        (lambda path: path.write_bytes(b""), "weights.pth", "is damaged"),
        (lambda path: path.write_bytes(b""), "weights.safetensors", "is damaged"),
        (lambda path: path.write_text("text"), "weights.pth", "is damaged"),
        (_with_code, "weights.pth", "holds code, which is not run"),
        (_plain_pickle_with_code, "weights.pth", "holds code, which is not run"),
        (_other_architecture, "weights.pth", "is not for mobilenet_v3_small"),
        (_not_a_dictionary, "weights.pth", "is not a dictionary of tensors"),
        (_nested, "weights.pth", "is not a dictionary of tensors"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "weights.safetensors", "is not for mobilenet_v3_small"),
        (lambda path: save_file({}, path, {METADATA_KEY: "[1"}), "weights.safetensors", "is damaged"),
        (lambda path: save_file({}, path, {METADATA_KEY: "[1]"}), "weights.safetensors", "is damaged"),
        (
            lambda path: save_file({}, path, {METADATA_KEY: '{"preprocessing": {"size": 1}}'}),
            "weights.safetensors",
            "is damaged",
        ),
    ],
)
def test_a_weight_file_that_cannot_be_used_is_refused(
    built: Project, refusal: Refusal, write: Callable[[Path], object] | None, name: str, message: str
) -> None:
    before = snapshot(built)
    if write:
        write(built.path(name))
    built.set("model.weights", f"./{name}")
    line = refusal(built, "build_model")
    assert line.startswith("error: model.weights: ")
    assert name in line
    assert message in line
    assert snapshot(built) == before
    assert not built.path("executed").exists()


@pytest.mark.parametrize(
    ("workers", "spoil", "message"),
    [
        (0, Path.unlink, "gone since the split was made"),
        (2, Path.unlink, "gone since the split was made"),
        (0, lambda path: path.write_bytes(path.read_bytes() + b"\0"), "changed since the split was made"),
        (0, lambda path: path.write_bytes(b""), "changed since the split was made"),
    ],
    ids=["deleted", "deleted, two workers", "changed", "emptied"],
)
def test_an_image_deleted_or_changed_after_split_is_named(
    built: Project, refusal: Refusal, workers: int, spoil: Callable[[Path], object], message: str
) -> None:
    from stages.images.index import read_index

    entry = read_index(built.path("data/index/train.csv"))[3]
    spoil(built.path("images") / entry.path)
    built.set("workers", workers)
    line = refusal(built, "train_head")
    assert f"images/{entry.path}: {message}" in line
    assert not built.checkpoint("head").exists()


def test_a_checkpoint_with_other_classes_is_refused(built: Project, refusal: Refusal) -> None:
    for name in ("train", "val", "test"):
        path = built.path(f"data/index/{name}.csv")
        path.write_text(path.read_text().replace(",cat,", ",cow,"))
    assert "initial.safetensors: made for the classes cat, dog, but the index has cow, dog" in refusal(
        built, "train_head"
    )


@pytest.mark.parametrize("spoil", ["missing", "truncated", "foreign"])
def test_a_checkpoint_that_cannot_be_used_is_refused(built: Project, refusal: Refusal, spoil: str) -> None:
    path = built.checkpoint("initial")
    if spoil == "missing":
        path.unlink()
    elif spoil == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        save_file({"x": torch.zeros(1)}, path)
    assert "initial.safetensors: " in refusal(built, "train_head")


@pytest.mark.parametrize(
    "text", ["", "a,b\n1,2\n", "path,label,class,sha256\nx,one,cat,0\n", "path,label,class,sha256\nx\n"]
)
def test_a_file_that_is_not_an_index_is_refused(built: Project, refusal: Refusal, text: str) -> None:
    built.path("data/index/train.csv").write_text(text)
    assert "train.csv: not an index file" in refusal(built, "train_head")


def test_a_stage_without_its_inputs_names_dvc_repro(project: Project, refusal: Refusal) -> None:
    for stage in STAGES[1:]:
        assert "`dvc repro`" in refusal(project, stage)


def _limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))


def fail_on_a_full_disk(project: Project, stage: str) -> str:
    # A limit on the size of files fails the same calls as a full disk, and needs no disk to fill.
    process = project.start(stage, preexec_fn=_limit_file_size)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1, error
    assert error.count("\n") == 1
    assert "; free some space and run the same command again" in error
    return error


@pytest.mark.slow
def test_a_full_disk_leaves_every_output_whole(project: Project) -> None:
    assert project.run(*STAGES) == 0
    before = snapshot(project)
    for stage in ("split", "build_model", "evaluate", "plot"):
        fail_on_a_full_disk(project, stage)
        assert snapshot(project) == before


def test_a_full_disk_during_training_names_the_history_and_leaves_the_checkpoint(built: Project) -> None:
    assert built.run("train_head") == 0
    before = built.checkpoint("head").read_bytes()
    assert "metrics/train_head" in fail_on_a_full_disk(built, "train_head")
    assert built.checkpoint("head").read_bytes() == before


@pytest.mark.parametrize("stage", ["split", "train_head"])
def test_a_temporary_folder_too_long_for_sockets_is_named(
    built: Project, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    folder = built.path("a folder for temporary files whose path leaves no room for a socket's name")
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    built.set("workers", 2)
    assert f"workers: the path of the folder for temporary files, {folder}, is too long" in refusal(built, stage)
    built.set("workers", 0)
    assert built.run(stage) == 0


@pytest.mark.parametrize("stage", ["split", "train_head"])
def test_a_killed_decoding_process_is_reported_in_one_line(
    built: Project, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def die(_: Path) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""

    monkeypatch.setattr("stages.images.check.read_image", die)
    monkeypatch.setattr("stages.images.batches.read_image", die)
    built.set("workers", 2)
    assert "workers: a process was killed" in refusal(built, stage)
    # Its broken connections complain when they are collected: here, and not in the midst of another test.
    gc.collect()


def test_ctrl_c_ends_a_stage_with_one_line_and_no_partial_output(built: Project) -> None:
    built.set("train_head.epochs", 10_000)
    built.set("workers", 2)
    process = built.start("train_head", start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the decoding processes too
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "error: interrupted; run the same command again\n"
    assert not built.checkpoint("head").exists()
    assert not list(built.path("data").rglob("*.tmp"))


def test_ctrl_c_ends_training_even_if_its_exception_is_swallowed(
    built: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Interrupt, "seen", False)  # put back at the end
    real, calls = objective.loss, 0

    def lose_an_interrupt(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
        return real(*arguments)

    monkeypatch.setattr(objective, "loss", lose_an_interrupt)
    assert built.run("train_head") == 130
    assert capsys.readouterr().err == "error: interrupted; run the same command again\n"
    assert calls == 3
    assert not built.checkpoint("head").exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc to see what a process has loaded")
@pytest.mark.parametrize("delay", [0, 0.1, 0.3])
def test_ctrl_c_while_libraries_load_ends_with_the_same_line(project: Project, delay: float) -> None:
    process = project.start("train_head", start_new_session=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "error: interrupted; run the same command again\n"

"""Several processes train what one would: the same images, the same steps, the same scores."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Project, make_images
from safetensors.torch import load_file
from test_features import kept_files
from test_resume import outputs, states

from stages.common.cli import LOST, StageError
from stages.common.params import Params
from stages.common.ranks import Share, count_processes
from stages.images.batches import Order
from stages.images.index import read_index, write_index
from stages.training import cache
from stages.training.history import read_history

PHASES = ("train_head", "finetune")


def free_port() -> int:
    with closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def run_together(
    project: Project, *stages: str, count: int = 2, caches: list[Path] | None = None, before: Callable[[int], None] = id
) -> list[int]:
    """Run stages in several processes, as torchrun starts them; return the exit codes of the first that fails.

    What they print goes to `printed.RANK`, why they fail to `failed.RANK`. With `caches`, each is a machine of its own;
    `before` is called in each with its number.
    """
    for stage in stages:
        port = free_port()

        def one(rank: int, stage: str = stage, port: int = port) -> None:
            os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{count}", LOCAL_WORLD_SIZE=f"{count}")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
            os.environ["TORCHELASTIC_ERROR_FILE"] = str(project.path(f"failed.{rank}"))
            if caches is not None:
                os.environ.update({cache.VARIABLE: str(caches[rank]), "GROUP_RANK": f"{rank}", "LOCAL_RANK": "0"})
            sys.stdout = sys.stderr = project.path(f"printed.{rank}").open("w")
            before(rank)
            code = project.run(stage)
            sys.stdout.flush()
            os._exit(code)

        fork = multiprocessing.get_context("fork")
        running = [fork.Process(target=one, args=(rank,)) for rank in range(count)]
        for process in running:
            process.start()
        for process in running:
            process.join(60)
        codes = [process.exitcode for process in running]
        if any(codes):
            return codes
    return [0] * count


def losses(project: Project, stage: str) -> list[float]:
    epochs = read_history(project.path(f"metrics/{stage}"))
    return [loss for epoch in epochs for loss in (epoch.train_loss, epoch.val_loss) if loss is not None]


def accuracies(project: Project, stage: str) -> list[float]:
    epochs = read_history(project.path(f"metrics/{stage}"))
    return [epoch.accuracy for epoch in epochs] + [epoch.train_accuracy for epoch in epochs if epoch.number]


@pytest.fixture
def built(project: Project) -> Project:
    for phase in PHASES:
        project.set(f"{phase}.batch_size", 9)  # 28 images: the last batch has one of them
        project.set(f"{phase}.epochs", 3)
    project.set("finetune.lr", 1e-3)
    project.build()
    return project


def plain(project: Project) -> None:
    # Adam's steps would be the same for half the gradient.
    for phase in PHASES:
        project.set(f"{phase}.optimizer", "sgd")
        project.set(f"{phase}.lr", 1e-2)


def with_every_key(project: Project) -> None:
    project.use_every_training_key("adamw")


def augmented_live(project: Project) -> None:
    for phase in PHASES:
        project.set(f"{phase}.augment", "light")


def mixed(project: Project) -> None:
    augmented_live(project)
    for phase in PHASES:
        project.set(f"{phase}.mixup", 0.4)


def three_classes(project: Project) -> None:
    make_images(project.path("images"), ("cat", "dog", "horse"))
    project.set("model.head", "pooled")
    project.build()


def nothing_kept(project: Project) -> None:
    project.set("cache.max_gigabytes", 0)


@pytest.mark.usefixtures("cold_cache")
@pytest.mark.parametrize(
    ("change", "count"),
    [(plain, 2), (mixed, 3)]
    + [
        pytest.param(change, count, marks=pytest.mark.slow)
        for change, count in ((with_every_key, 3), (three_classes, 2), (augmented_live, 2), (nothing_kept, 2))
    ],
)
def test_several_processes_train_and_score_like_one(
    built: Project, change: Callable[[Project], None], count: int
) -> None:
    change(built)
    stages = {plain: [*PHASES, "evaluate"], mixed: ["train_head"]}.get(change, [*PHASES])
    assert built.run(*stages) == 0
    alone = {stage: (losses(built, stage), accuracies(built, stage)) for stage in PHASES if stage in stages}
    if "evaluate" in stages:
        scores, copies = scored(built)
    shutil.rmtree(cache.cache_folder())

    assert run_together(built, *stages, count=count) == [0] * count
    for stage, (expected, fractions) in alone.items():
        assert losses(built, stage) == pytest.approx(expected, abs=1e-4)
        assert accuracies(built, stage) == pytest.approx(fractions, abs=1e-6)
    if "evaluate" in stages:
        together, others = scored(built)
        assert together == pytest.approx(scores, abs=1e-4)
        assert others == copies


def scored(project: Project) -> tuple[np.ndarray, str]:
    with np.load(project.path("data/predictions.npz")) as archive:
        probabilities = np.concatenate([archive["head"], archive["finetuned"]])
    return probabilities, project.path("metrics/near_duplicates.csv").read_text()


def test_the_same_number_of_processes_gives_the_same_bytes_and_changes_nothing_frozen(
    built: Project, cold_cache: Path
) -> None:
    built.set("model.head", "original")  # with dropout
    assert built.run("build_model") == 0
    assert run_together(built, *PHASES) == [0, 0]
    assert "2 processes, each has 4 or 5 images of a batch of 9" in built.path("printed.0").read_text()
    first = outputs(built, "finetune")
    shutil.rmtree(cold_cache)
    assert run_together(built, "finetune") == [0, 0]
    assert outputs(built, "finetune") == first
    before, after = (load_file(built.checkpoint(name)) for name in ("initial", "finetuned"))
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    norms = {name.removesuffix(".running_mean") for name in before if name.endswith(".running_mean")}
    assert not any(name.rpartition(".")[0] in norms for name in moved)
    blocks = sorted({int(name.split(".")[1]) for name in before if name.startswith("backbone.")})
    assert {int(name.split(".")[1]) for name in moved if name.startswith("backbone.")} == set(blocks[-3:])


@pytest.mark.usefixtures("cold_cache")
def test_more_processes_than_validation_images_train_and_score(built: Project) -> None:
    index = built.path("data/index/val.csv")
    write_index(index, read_index(index)[:1])
    built.set("train_head.search", True)
    built.set("model.head", "pooled")
    assert built.run("build_model") == 0
    assert run_together(built, *PHASES, "evaluate", count=3) == [0, 0, 0]


@pytest.mark.usefixtures("cold_cache")
def test_each_image_is_computed_by_one_process_and_only_the_first_one_prints(built: Project) -> None:
    assert run_together(built, "train_head", count=3) == [0, 0, 0]
    printed = [built.path(f"printed.{rank}").read_text() for rank in range(3)]
    assert "3 processes, each has 3 images of a batch of 9" in printed[0]
    assert "activations: 32 images" in printed[0]
    assert printed[1:] == ["", ""]
    kept = [
        path for path in kept_files(cache.cache_folder()) if path.parent == kept_files(cache.cache_folder())[0].parent
    ]
    assert len(kept) == 3
    for path in kept:
        assert len(load_file(path)["activations"]) in (10, 11)


def test_each_process_has_its_own_seed_and_the_first_one_has_that_of_the_parameters(built: Project) -> None:
    def note_the_seed(rank: int) -> None:
        from stages import train_head

        prepare = train_head.prepare

        def noted(params: Params) -> torch.device:
            device = prepare(params)
            built.path(f"seed.{rank}").write_text(f"{torch.initial_seed()}")
            return device

        train_head.prepare = noted

    built.set("train_head.epochs", 1)
    assert run_together(built, "train_head", count=3, before=note_the_seed) == [0, 0, 0]
    seeds = [int(built.path(f"seed.{rank}").read_text()) for rank in range(3)]
    assert seeds[0] == built.params["seed"]
    assert len(set(seeds)) == 3


def test_killed_processes_resume_together_and_end_with_the_same_bytes(built: Project) -> None:
    built.set("model.head", "original")
    built.set("train_head.augment", "light")
    built.set("train_head.epochs", 4)
    assert built.run("build_model") == 0
    assert run_together(built, "train_head") == [0, 0]
    whole = outputs(built, "train_head")
    assert states() == []

    def end_after_the_second_epoch(rank: int) -> None:
        from stages.training import resume
        from stages.training.history import History

        resume.SECONDS = 0.0
        add = History.add

        def add_or_end(history: History, epoch: object) -> None:
            if epoch.number == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            add(history, epoch)

        History.add = add_or_end

    codes = run_together(built, "train_head", before=end_after_the_second_epoch)
    assert codes == [LOST, -signal.SIGKILL]
    assert "another process of this training has ended" in built.path("failed.0").read_text()
    assert len(states()) == 1
    assert run_together(built, "train_head") == [0, 0]
    assert "resuming after epoch 2" in built.path("printed.0").read_text()
    assert outputs(built, "train_head") == whole
    assert states() == []


@pytest.mark.parametrize("shared", [False, True])
def test_machines_without_a_shared_cache_are_refused(built: Project, tmp_path: Path, shared: bool) -> None:
    caches = [tmp_path / "cache", tmp_path / ("cache" if shared else "other cache")]
    codes = run_together(built, "train_head", caches=caches)
    assert codes == ([0, 0] if shared else [1, 1])
    if not shared:
        assert "DVC_FINETUNE_CACHE: the machines do not see the same files in" in built.path("failed.0").read_text()


def test_machines_with_different_files_are_refused_and_the_file_is_named(built: Project, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(built.folder, other, ignore=shutil.ignore_patterns("other"))
    Project.set(built, "train_head.lr", 0.1)

    def move(rank: int) -> None:
        if rank == 1:
            built.folder = other

    codes = run_together(built, "train_head", before=move)
    assert codes == [1, 1]
    assert "params.yaml: not the same on all machines" in built.path("failed.0").read_text()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [None, 4])
def test_the_ranks_of_a_pass_cover_every_image_once(count: int, seed: int | None) -> None:
    whole = list(Order(23, seed))
    shares = [Share(rank, count) for rank in range(count)]
    parts = [list(Order(23, seed, share=share)) for share in shares]
    for place, item in enumerate(whole):
        assert parts[place % count][place // count] == item
    for share, part in zip(shares, parts, strict=True):
        assert sum(map(len, share.places(23, 4))) == len(part)
    for number, batch in enumerate(zip(*(share.places(23, 4) for share in shares), strict=True)):
        places = {place: rank for rank, own in enumerate(batch) for place in own}
        assert sorted(places) == list(range(3 if number == 5 else 4))
        assert all(rank == (4 * number + place) % count for place, rank in places.items())


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_processes("auto", "cpu") == 1
    assert count_processes(3, "cpu") == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [count_processes("auto", device) for device in ("auto", "cuda", "cuda:1", "cpu")] == [4, 4, 1, 1]
    assert count_processes(2, "cuda") == 2
    with pytest.raises(StageError, match="processes: 5 need a GPU each, but this machine has 4"):
        count_processes(5, "auto")
    with pytest.raises(StageError, match="processes: 2 need a GPU each, but device: cuda:1 is one"):
        count_processes(2, "cuda:1")


def test_more_processes_than_images_in_a_batch_are_refused(built: Project) -> None:
    built.set("train_head.batch_size", 1)
    assert run_together(built, "train_head") == [1, 1]
    assert "processes: 2 are more than a batch has images, 1" in built.path("failed.0").read_text()


def start_two(built: Project) -> subprocess.Popen[str]:
    """Start the head phase as the user does, long enough to be stopped."""
    built.set("processes", 2)
    built.set("train_head.epochs", 100_000)
    process = built.start("train_head")
    assert process.stdout is not None
    assert any("epoch 1/" in line for line in process.stdout)
    return process


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in children.read_text().split()]


def wait_until_gone(ranks: list[int]) -> None:
    until = time.monotonic() + 10
    while any(Path(f"/proc/{each}").exists() for each in ranks):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_process_ends_the_others_with_one_line(built: Project) -> None:
    process = start_two(built)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGKILL)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 1
    assert error == (
        "error: processes: number 1 was ended by SIGKILL, probably out of memory; use fewer, or a smaller batch_size\n"
    )
    wait_until_gone(ranks)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_ends_all_processes(built: Project) -> None:
    process = start_two(built)
    ranks = ranks_of(process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert error == "error: interrupted; run the same command again\n"
    wait_until_gone(ranks)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_processes_end_when_their_launcher_is_killed(built: Project) -> None:
    process = start_two(built)
    ranks = ranks_of(process)
    process.kill()
    process.communicate(timeout=20)
    wait_until_gone(ranks)


@pytest.mark.slow
def test_a_failure_in_one_process_is_reported_in_one_line(built: Project) -> None:
    gone = built.parts()["train"][1]
    built.path(f"images/{gone.path}").unlink()
    built.set("processes", 2)
    built.set("train_head.augment", "light")
    process = built.start("train_head")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error == (
        f"error: images/{gone.path}: gone since the split was made; bring it back, or run `dvc repro` to split again\n"
    )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def two_networks() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    names = [f"dvcft{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "veth0")
            for link in ("veth0", "lo"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_two_machines_train_one_network_and_each_has_the_result(
    built: Project, two_networks: list[str], tmp_path: Path
) -> None:
    built.set("processes", 1)
    folders = [tmp_path / f"machine{number}" for number in range(2)]
    running = []
    for number, (folder, network) in enumerate(zip(folders, two_networks, strict=True)):
        shutil.copytree(built.folder, folder, ignore=shutil.ignore_patterns("machine*"))
        torchrun = {"PET_NNODES": "2", "PET_NODE_RANK": f"{number}", "PET_MASTER_ADDR": "10.77.0.1"}
        environment = {**os.environ, **torchrun, "GLOO_SOCKET_IFNAME": "veth0", "PYTHONPATH": str(ROOT)}
        environment[cache.VARIABLE] = str(tmp_path / "cache")
        stage = [sys.executable, "-m", "stages.train_head", *built.arguments("train_head")]
        running.append(
            subprocess.Popen(
                ["ip", "netns", "exec", network, *stage],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    printed = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    assert "2 processes, each has 4 or 5 images of a batch of 9" in printed[0]
    assert "kept epoch" not in printed[1]
    results = []
    for folder in folders:
        built.folder = folder
        results.append(outputs(built, "train_head"))
    assert results[0] == results[1]

"""Near-identical pictures across training and test: found through the real stages, and the rules that find them."""

import csv
import json
import multiprocessing
from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, Project
from PIL import Image, ImageDraw
from torch import nn

from stages.images.index import Entry, read_index
from stages.network.checkpoint import load_checkpoint
from stages.network.network import cut, pool_features
from stages.scores import near_duplicates, similarity
from stages.scores.near_duplicates import LOOKED_FOR, Similar
from stages.scores.predictions import Predictions
from stages.scores.similarity import find_similar
from stages.training.batches import Batches, open_batches
from stages.training.features import FrozenPrefix, Kept
from stages.training.loop import Trainer, predict


def make_scenes(root: Path, count: int) -> None:
    """Discs on one kind of picture, boxes on the other, on soft grounds: no two alike."""
    for label, name in enumerate(("disc", "box")):
        (root / name).mkdir(parents=True)
        for number in range(count):
            random = np.random.default_rng([label, number])
            coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            scene = coarse.resize((96, 96), Image.Resampling.BICUBIC)
            draw = ImageDraw.Draw(scene)
            for _ in range(3):
                x, y, size = random.uniform(8, 64, 3)
                shape = (x, y, x + size / 2, y + size / 2)
                colour = tuple(random.integers(0, 256, 3).tolist())
                (draw.rectangle if label else draw.ellipse)(shape, fill=colour)
            scene.save(root / name / f"{number:03d}.png")


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_training_picture_saved_again_and_put_into_the_test_part_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    make_scenes(tmp_path / "pictures", count=40)
    project = Project(tmp_path)
    project.set("model", {"arch": "mobilenet_v3_large", "weights": str(ROOT / "data/glyphs/backbone.safetensors"),
                          "head": "pooled", "hidden": 8, "image_size": 64})  # fmt: skip
    project.set("precision", precision)
    project.set("finetune.unfreeze", 4)
    for phase in ("train_head", "finetune"):
        project.set(f"{phase}.epochs", 1)
    project.build()
    assert project.run("train_head", "finetune") == 0
    original, watched = (read_index(project.path(f"data/index/{part}.csv"))[0] for part in ("train", "val"))
    project.plant(original, "box/again.jpg", quality=80)
    project.plant(watched, "box/watched.jpg", quality=60)
    capsys.readouterr()
    assert project.run("evaluate") == 0

    table = project.path("metrics/near_duplicates.csv").read_text()
    header, *rows = csv.reader(table.splitlines())
    assert header == ["test", "train", "cosine"]
    assert {(row[0], row[1]) for row in rows} == {
        ("box/again.jpg", original.path),
        ("box/watched.jpg", watched.path),
    }
    cosines = [float(row[2]) for row in rows]
    assert cosines == sorted(cosines, reverse=True)
    assert all(similarity.THRESHOLD <= cosine <= 1 for cosine in cosines)

    evaluation = json.loads(project.path("metrics/scores.json").read_text())
    summary = evaluation["near_duplicates"]
    assert (summary["pairs"], summary["test_pictures"]) == (2, 2)
    with project.path("metrics/predictions.csv").open(newline="") as file:
        predictions = list(csv.reader(file))[1:]
    for model, column in (("head", 3), ("finetuned", 5)):
        clean = [row for row in predictions if row[0] not in {"box/again.jpg", "box/watched.jpg"}]
        assert len(clean) == len(predictions) - 2
        right = [(float(row[column]) >= 0.5) == (row[1] == "1") for row in clean]
        assert summary[f"{model}_accuracy"] == pytest.approx(np.mean(right), abs=1e-12)
    assert "2 of 18 test pictures are nearly the same as a training or validation picture" in capsys.readouterr().out

    # As a large set: what training has seen is read in batches, after a sample of it.
    with monkeypatch.context() as patch:
        patch.setattr(similarity, "_SAMPLE", 40)
        patch.setattr(similarity, "_CHUNK", 8)
        assert project.run("evaluate") == 0
    again = list(csv.reader(project.path("metrics/near_duplicates.csv").read_text().splitlines()))[1:]
    assert [row[:2] for row in again] == [row[:2] for row in rows]

    # Nothing can be kept: every picture is decoded anew, and the pairs are the same.
    project.set("cache.max_gigabytes", 0)
    assert project.run("evaluate") == 0
    again = list(csv.reader(project.path("metrics/near_duplicates.csv").read_text().splitlines()))[1:]
    assert [row[:2] for row in again] == [row[:2] for row in rows]
    assert [float(row[2]) for row in again] == pytest.approx(cosines, abs=1e-3)


@pytest.mark.parametrize("unfreeze", [0, 3, 13])
def test_a_picture_has_the_same_features_through_the_tail_as_through_the_whole_backbone(
    project: Project, unfreeze: int
) -> None:
    project.build()
    entries = read_index(project.path("data/index/test.csv"))
    network, description = load_checkpoint(project.checkpoint("initial"))
    cpu = torch.device("cpu")

    def inputs_of(blocks: nn.Sequential) -> Batches:
        prefix = FrozenPrefix(blocks, project.path("pictures"), description.preprocessing, cpu, "float32", 0)
        return open_batches(prefix, entries, Kept(), 3)

    blocks, tail = cut(network, unfreeze)
    trainer = Trainer(tail, cpu)
    collected: list[torch.Tensor] = []
    predict(
        [trainer, trainer], inputs_of(blocks), on_features=lambda features: collected.append(pool_features(features))
    )
    whole = torch.cat([pool_features(activations) for activations, *_ in inputs_of(network.backbone)])
    assert whole.shape == (len(entries), 576)
    assert whole.std(dim=0).max() > 0.1
    torch.testing.assert_close(torch.cat(collected), whole, rtol=1e-4, atol=1e-5)
    inputs = next(iter(inputs_of(blocks)))[0]
    assert torch.equal(trainer.features_and_logits(inputs)[1], trainer.logits(inputs))


def find(train: torch.Tensor, test: torch.Tensor) -> list[tuple[int, int, float]]:
    return find_similar(train, [train], test, "float32").pairs


def make_features(count: int, seed: int, channels: int = 64, decades: int = 2) -> torch.Tensor:
    """Features as of a network: much in common, few directions with most of the variance, many with little."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -decades, channels)
    return 5 + torch.randn(count, channels, generator=generator) * scale


def test_copies_are_found_among_features_that_have_much_in_common() -> None:
    train, test = make_features(300, 0), make_features(50, 1)
    test[7] = train[20] * 1.001
    test[9] = train[20]
    test[11] = train[299] + 1e-3
    found = find(train, test)
    assert sorted((row, column) for row, column, _ in found) == [(7, 20), (9, 20), (11, 299)]
    plain = torch.nn.functional.normalize(test) @ torch.nn.functional.normalize(train).T
    assert plain.min() > similarity.THRESHOLD


def test_rounding_to_half_precision_does_not_hide_copies() -> None:
    train, test = (make_features(count, seed, channels=256, decades=5) for count, seed in ((1000, 0), (50, 1)))
    test[:10] = train[:10]
    generator = torch.Generator().manual_seed(2)
    train, test = (
        features * (1 + torch.finfo(torch.bfloat16).eps * (torch.rand(features.shape, generator=generator) - 0.5))
        for features in (train, test)
    )
    found = find_similar(train, [train], test, "bfloat16").pairs
    assert sorted((row, column) for row, column, _ in found) == [(number, number) for number in range(10)]
    assert find(train, test) == []  # as if there were no rounding


def test_pairs_do_not_depend_on_the_size_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = make_features(300, 0), make_features(50, 1)
    test[[3, 22, 49]] = train[[1, 2, 3]]
    whole = find(train, test)
    monkeypatch.setattr(similarity, "_BLOCK", 7)
    monkeypatch.setattr(similarity, "_CHUNK", 9)
    blocks = find_similar(train, train.split(5), test, "float32").pairs
    assert [pair[:2] for pair in blocks] == [pair[:2] for pair in whole] == [(3, 1), (22, 2), (49, 3)]
    assert [pair[2] for pair in blocks] == pytest.approx([pair[2] for pair in whole], abs=1e-6)


def test_of_many_alike_each_test_picture_lists_its_first_and_all_are_counted() -> None:
    train, test = make_features(300, 0), make_features(50, 1)
    train[100:] = train[100]
    test[[3, 40]] = train[100]
    test[7] = train[5]
    found = find_similar(train, train.split(64), test, "float32")
    assert found.count == 2 * 200 + 1
    assert np.flatnonzero(found.paired).tolist() == [3, 7, 40]
    listed = [(row, column) for row in (3, 40) for column in range(100, 110)]
    assert sorted(pair[:2] for pair in found.pairs) == sorted([*listed, (7, 5)])


@pytest.mark.parametrize("count", [3, 6])
def test_several_processes_find_what_one_finds(tmp_path: Path, count: int) -> None:
    train, test = make_features(300, 0), make_features(5, 1)
    train[100:120] = train[100]
    test[[0, 4]] = train[100]
    test[3] = train[5]
    alone = find_similar(train, train.split(64), test, "float32")

    def one(rank: int) -> None:
        dist.init_process_group("gloo", f"file://{tmp_path}/meet", rank=rank, world_size=count)
        torch.save(find_similar(train, train.split(64), test, "float32"), tmp_path / f"{rank}")
        dist.destroy_process_group()

    running = [multiprocessing.get_context("fork").Process(target=one, args=(rank,)) for rank in range(count)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    for rank in range(count):
        found = torch.load(tmp_path / f"{rank}", weights_only=False)
        assert [pair[:2] for pair in found.pairs] == [pair[:2] for pair in alone.pairs]
        assert [pair[2] for pair in found.pairs] == pytest.approx([pair[2] for pair in alone.pairs], abs=1e-6)
        assert found.count == alone.count == 41
        assert found.paired.tolist() == alone.paired.tolist() == [True, False, False, True, True]


def test_a_sample_of_the_training_pictures_measures_the_whitening_for_all() -> None:
    train, test = make_features(4000, 0, channels=256), make_features(600, 1, channels=256)
    test[::6] = train[: 100 * 7 : 7] + 0.02 * make_features(100, 2, channels=256).sub(5)
    sample = train[::4]
    found = find_similar(sample, train.split(128), test, "float32")
    assert sorted(pair[:2] for pair in found.pairs) == [(6 * number, 7 * number) for number in range(100)]
    # As without the first look in a few directions.
    mean, whitening = similarity._whitening(sample.double(), torch.finfo(torch.float32).eps)
    known, asked = (similarity._unit((features.double() - mean) @ whitening) for features in (train, test))
    cosines = {(row, column): cosine for row, column, cosine in found.pairs}
    assert cosines == pytest.approx(
        {(row, column): (asked[row] @ known[column]).item() for row, column in cosines}, abs=1e-5
    )
    assert int((asked @ known.T >= similarity.THRESHOLD).sum()) == found.count == 100


def test_at_most_ten_thousand_pictures_are_a_sample_from_all_over_the_index() -> None:
    assert similarity.thin(list(range(10_000))) == list(range(10_000))
    assert similarity.thin([]) == []
    some = similarity.thin(list(range(25_000)))
    assert 5_000 <= len(some) <= 10_000
    assert (some[0], some[-1]) == (0, 24_999 // 3 * 3)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_features_that_say_nothing_pair_nothing(count: int) -> None:
    for value in (0.0, 3.0):
        assert find(torch.full((count, 8), value), torch.full((5, 8), value)) == []
    assert find(torch.zeros(count, 8), make_features(5, 0)[:, :8]) == []


def test_dead_channels_and_fewer_pictures_than_channels_do_no_harm() -> None:
    train, test = make_features(20, 0), make_features(20, 1)
    train[:, 10:30] = test[:, 10:30] = 0
    test[4] = train[6]
    test[5] = 0
    found = find(train, test)
    assert [pair[:2] for pair in found] == [(4, 6)]
    assert found[0][2] == pytest.approx(1, abs=1e-4)


def entry(path: str) -> Entry:
    return Entry(path, 0, "cat", "")


def test_the_most_similar_pair_comes_first_then_paths_decide(tmp_path: Path) -> None:
    train, test = [entry("t/1"), entry("t/2")], [entry("b"), entry("a, b"), entry("c")]
    found = [(0, 1, 0.91), (0, 0, 0.910001), (1, 0, 0.91), (2, 1, 0.99999)]
    pairs = near_duplicates.name_pairs(Similar(found, 4, np.ones(3, dtype=bool)), train, test)
    near_duplicates.write_near_duplicates(tmp_path / "pairs.csv", pairs)
    assert near_duplicates.read_near_duplicates(tmp_path / "pairs.csv") == pairs
    assert (tmp_path / "pairs.csv").read_text() == (
        'test,train,cosine\nc,t/2,1.0000\n"a, b",t/1,0.9100\nb,t/1,0.9100\nb,t/2,0.9100\n'
    )


@pytest.mark.parametrize(
    ("paired", "expected", "line"),
    [
        (
            set(),
            (0, 0, 2 / 3, 1.0),
            f"No test picture was found to be nearly the same as a training or validation picture. {LOOKED_FOR}",
        ),
        (
            {"a"},
            (2, 1, 0.5, 1.0),
            "1 of 3 test pictures is nearly the same as a training or validation picture; "
            "without them: head 50.00%, fine-tuned 100.00%.",
        ),
        (
            {"a", "b", "c"},
            (6, 3, None, None),
            "3 of 3 test pictures are nearly the same as a training or validation picture.",
        ),
    ],
)
def test_accuracy_is_given_without_the_pictures_in_pairs(
    paired: set[str], expected: tuple[float | None, ...], line: str
) -> None:
    similar = Similar([], 2 * len(paired), np.array([path in paired for path in "abc"]))
    labels = np.array([0, 1, 1])
    predictions = Predictions(["a", "b", "c"], labels, ["cat", "dog"], np.eye(2)[[0, 1, 0]], np.eye(2)[labels])
    summary = near_duplicates.summarize(similar, similarity.THRESHOLD, predictions)
    assert astuple(summary) == (similarity.THRESHOLD, *expected)
    assert list(asdict(summary)) == ["threshold", "pairs", "test_pictures", "head_accuracy", "finetuned_accuracy"]
    assert near_duplicates.describe_near_duplicates(summary, 3) == line

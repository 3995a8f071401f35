"""A folder of images that `dvc exp run` would commit to git is remarked."""

import subprocess

import pytest
from conftest import Project, make_images
from PIL import Image

WARNING = "warning: data.path: {} is in the repository, but neither ignored by git nor tracked by DVC"


def git(project: Project, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *arguments], cwd=project.folder, check=True)


def warnings(project: Project, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert project.run("split") == 0
    return capsys.readouterr().err


def test_an_untracked_folder_in_the_repository_is_remarked(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    git(project, "init", "--quiet")
    assert WARNING.format("images") in warnings(project, capsys)
    project.set("data.path", str(project.path("images")))
    assert WARNING.format(project.path("images")) in warnings(project, capsys)
    project.path(".gitignore").write_text("/images\n")  # as `dvc add` does
    assert warnings(project, capsys) == ""


def test_a_folder_with_a_few_new_images_is_remarked_and_one_that_git_has_is_not(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    git(project, "init", "--quiet")
    git(project, "add", "--all")
    assert warnings(project, capsys) == ""
    Image.new("RGB", (40, 40), "red").save(project.path("images/cat/new.png"))
    assert WARNING.format("images") in warnings(project, capsys)


def test_a_folder_elsewhere_is_nothing_to_git(
    project: Project, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    git(project, "init", "--quiet")
    project.set("data.path", str(make_images(tmp_path_factory.mktemp("elsewhere"))))
    assert warnings(project, capsys) == ""


def test_without_a_repository_or_without_git_nothing_is_said(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert warnings(project, capsys) == ""
    monkeypatch.setenv("PATH", "")
    assert warnings(project, capsys) == ""

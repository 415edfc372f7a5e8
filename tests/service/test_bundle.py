"""Scanning a repository."""

import shutil

import pytest

from service.bundle import FoundBundle, RefusedBundle, scan


@pytest.fixture
def repository(tiny_bundles, tmp_path):
    """A repository with one model, `tiny-fp32`, whose version 1 is real."""
    shutil.copytree(tiny_bundles["fp32"].directory, tmp_path / "tiny-fp32" / "1")
    return tmp_path


@pytest.mark.parametrize("name", ["0", "01", "-1", "1a", "2147483648", "99999999999", "\u0661", ".2-scratch"])
def test_a_directory_whose_name_is_no_version_is_passed_over(repository, name):
    shutil.copytree(repository / "tiny-fp32" / "1", repository / "tiny-fp32" / name)
    assert [found.manifest.version for found in scan(repository) if isinstance(found, FoundBundle)] == [1]
    assert len(scan(repository)) == 1


@pytest.mark.parametrize("name", ["2", "2147483647"])
def test_a_manifest_of_another_version_is_refused(repository, name):
    shutil.copytree(repository / "tiny-fp32" / "1", repository / "tiny-fp32" / name)
    first, second = scan(repository)
    assert isinstance(first, FoundBundle)
    assert isinstance(second, RefusedBundle)
    assert second.version == int(name)


def test_an_unfinished_export_is_passed_over(repository):
    (repository / "tiny-fp32" / "3").mkdir()
    assert len(scan(repository)) == 1


def test_a_repository_must_be_a_directory(tmp_path):
    with pytest.raises(NotADirectoryError, match="is not a directory"):
        scan(tmp_path / "nowhere")

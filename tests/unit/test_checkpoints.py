"""Of a folder that a training run writes into, complete checkpoints are found, each once, and never a part of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weight_transfer as wt
from weight_transfer.cli.checkpoints import Checkpoints, version_of

INDEX = wt.CheckpointSource.INDEX
SINGLE = wt.CheckpointSource.SINGLE


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A training run's folder, and whoever looks at it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.checkpoints = Checkpoints(folder, 2.0, clock=self.clock)

    def after(self, seconds: float) -> list[str]:
        """Look, and return the names of what is new."""
        self.clock.now += seconds
        return [source.path.name for source in self.checkpoints.new()]

    def write(self, name: str, *files: str, value: float = 1.0) -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for file in files:
            save_file({f"weight of {file}": torch.full((8,), value)}, folder / file)
        return folder

    def index(self, name: str, files: Sequence[str]) -> None:
        weight_map = {f"weight of {file}": file for file in files}
        (self.folder / name / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_checkpoint_is_new_once_it_has_not_changed_for_a_while(run: Run) -> None:
    run.write("step-1", SINGLE)
    assert run.after(0) == run.after(1.9) == []
    run.clock.now = 2.0
    [source] = run.checkpoints.new()
    run.checkpoints.take(source)
    assert run.after(10) == []


def test_one_that_grows_is_not_taken_before_it_is_whole(run: Run) -> None:
    whole = (run.write("elsewhere", SINGLE) / SINGLE).read_bytes()
    shutil.rmtree(run.folder / "elsewhere")
    folder = run.folder / "step-1"
    folder.mkdir()
    for length in (0, 4, 40, len(whole) - 1):
        (folder / SINGLE).write_bytes(whole[:length])
        assert run.after(5) == run.after(5) == []
    (folder / SINGLE).write_bytes(whole)
    assert run.after(5) == []
    assert run.after(5) == ["step-1"]


def test_shards_are_a_checkpoint_once_the_index_and_all_of_them_are_there(run: Run) -> None:
    shards = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    run.write("step-1", *shards[:2])
    assert run.after(5) == run.after(5) == []
    run.index("step-1", shards)
    assert run.after(5) == run.after(5) == []
    run.write("step-1", shards[2])
    assert run.after(5) == []
    assert run.after(5) == ["step-1"]


def test_other_folders_and_files_are_none(run: Run) -> None:
    run.write("optimizer", "state.safetensors")
    run.write("empty")
    save_file({"a": torch.zeros(1)}, run.folder / SINGLE)
    assert run.after(5) == run.after(5) == []


def test_one_that_is_written_anew_is_new_again_and_one_that_is_removed_is_not_missed(run: Run) -> None:
    run.write("latest", SINGLE)
    run.after(0)
    run.clock.now += 5
    [source] = run.checkpoints.new()
    run.checkpoints.take(source)
    run.write("latest", SINGLE, value=2.0)
    assert run.after(0) == []
    assert run.after(5) == ["latest"]
    shutil.rmtree(run.folder / "latest")
    assert run.after(5) == run.after(5) == []


def test_one_that_is_renamed_or_has_a_second_name_is_sent_once(run: Run) -> None:
    (run.folder / "latest").symlink_to(run.write("tmp-checkpoint-1", SINGLE))
    run.after(0)
    run.clock.now += 5
    [source] = run.checkpoints.new()
    assert source.path.name == "tmp-checkpoint-1"
    run.checkpoints.take(source)
    (run.folder / "tmp-checkpoint-1").rename(run.folder / "checkpoint-1")
    (run.folder / "latest").unlink()
    (run.folder / "latest").symlink_to("checkpoint-1")
    assert run.after(5) == run.after(5) == []
    run.write("checkpoint-2", SINGLE)
    assert run.after(5) == []
    assert run.after(5) == ["checkpoint-2"]


def test_one_that_is_written_anew_before_it_is_sent_is_not_sent_as_a_mixture(run: Run) -> None:
    shards = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    run.write("latest", *shards)
    run.index("latest", shards)
    run.after(0)
    run.clock.now += 5
    [source] = run.checkpoints.new()
    run.checkpoints.take(source)
    run.write("latest", shards[0], value=2.0)
    with pytest.raises(wt.IntegrityError, match="has changed since it was complete"):
        source.manifest()
    run.write("latest", shards[1], value=2.0)
    assert run.after(5) == []
    assert run.after(5) == ["latest"]


def test_several_come_in_the_order_in_which_they_were_written(run: Run) -> None:
    for second, name in enumerate(("step-9", "step-10", "step-2")):
        os.utime(run.write(name, SINGLE) / SINGLE, (second, second))
    run.after(0)
    assert run.after(5) == ["step-9", "step-10", "step-2"]


def test_a_folder_that_is_gone_is_an_error(run: Run) -> None:
    run.folder.rmdir()
    with pytest.raises(wt.ConfigError, match="cannot be listed"):
        run.after(0)


@pytest.mark.parametrize(
    ("name", "version"), [("checkpoint-200", 200), ("global_step_0040", 40), ("7", 7), ("latest", "latest")]
)
def test_a_version_is_the_number_of_the_checkpoint(name: str, version: int | str) -> None:
    assert version_of(Path("run") / name) == version

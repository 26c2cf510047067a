import errno
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aipo_graph.errors import ConfigError
from aipo_graph.learn import checkpoint


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((4, 3), float(step))}, "rng": {"cpu": torch.arange(8, dtype=torch.uint8)}}


def save(root: Path, step: int, keep: int = 2) -> str | None:
    return checkpoint.save(root, step, tensors(step), {"cursor": {"next": step}}, keep)


def loaded_step(root: Path) -> int:
    found = checkpoint.load(root)
    assert found is not None
    step = found.state["cursor"]["next"]
    assert found.path == root / f"step-{step:08d}"
    w = torch.zeros(found.shapes["w"])
    found.read({"w": w})
    assert torch.equal(w, tensors(step)["model"]["w"])
    return step


def test_newest_is_loaded_and_old_ones_are_pruned(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    for step in (1, 2, 10):
        assert save(tmp_path, step) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000002", "step-00000010"]
    assert (tmp_path / "LATEST").read_text() == "step-00000010"
    assert loaded_step(tmp_path) == 10
    assert save(tmp_path, 10) is None  # the same step again, as a resumed run may
    assert loaded_step(tmp_path) == 10


def test_every_flipped_byte_and_every_halved_file_is_detected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = tmp_path / "step-00000002"
    assert {path.name for path in newest.iterdir()} == {"model.safetensors", "rng.safetensors", "state.json", "MANIFEST.json"}
    for path in newest.iterdir():
        whole = path.read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << (position % 8)
            path.write_bytes(damaged)
            assert checkpoint.fault(newest), (path.name, position)
        assert loaded_step(tmp_path) == 1
        assert "step-00000002 skipped" in caplog.text
        assert "using the one before" in caplog.text
        path.write_bytes(whole[: len(whole) // 2])
        assert loaded_step(tmp_path) == 1
        path.unlink()
        assert loaded_step(tmp_path) == 1
        path.write_bytes(whole)
        assert loaded_step(tmp_path) == 2
        caplog.clear()


def test_any_other_writing_of_the_manifest_is_a_fault(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = tmp_path / "step-00000001" / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"\n", b"\t", 1))
    assert checkpoint.fault(manifest.parent) == "MANIFEST.json is damaged"


def test_a_file_that_the_manifest_does_not_know_is_a_fault(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "extra.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="none of the 1 is whole"):
        checkpoint.load(tmp_path)


def test_a_pointer_to_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    (tmp_path / "LATEST").write_text("step-00000009")
    assert loaded_step(tmp_path) == 1
    assert "LATEST names none of them" in caplog.text


def test_a_damaged_newer_one_never_displaces_good_ones(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 20)
    (tmp_path / "step-00000020" / "state.json").write_text("{}")
    save(tmp_path, 10)  # the resumed run saves at other steps
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000010"]
    assert loaded_step(tmp_path) == 10


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_disk_full_costs_one_checkpoint_only(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*args: object, **rest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        warning = save(tmp_path, 2)
    assert warning is not None
    assert "No space left on device" in warning
    assert "\n" not in warning
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000001"]
    assert loaded_step(tmp_path) == 1
    assert save(tmp_path, 3) is None
    assert loaded_step(tmp_path) == 3


def test_a_real_limit_on_file_size_costs_one_checkpoint_only(warm_python: str, tmp_path: Path) -> None:
    script = """
import resource, sys, torch
from pathlib import Path
from aipo_graph.learn import checkpoint
root = Path(sys.argv[1])
def save(step, size): return checkpoint.save(root, step, {"model": {"w": torch.zeros(size)}}, {}, 2)
assert save(1, 10) is None
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
print(save(2, 100_000))
assert sorted(p.name for p in root.iterdir()) == ["LATEST", "step-00000001"], list(root.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert save(3, 100_000) is None
assert checkpoint.load(root).path.name == "step-00000003"
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([warm_python, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not written" in done.stdout


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="make the folder writable"):
        save(tmp_path / "file" / "checkpoints", 1)


def die_at(nth: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a fork that is killed just before its nth fsync, rename, open or rmtree. True if it was killed."""
    child = os.fork()
    if child == 0:
        left = [nth]

        def deadly(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **rest: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return real(*args, **rest)

            return call

        for name in ("fsync", "rename", "open", "mkdir"):
            setattr(os, name, deadly(getattr(os, name)))
        checkpoint.save_file = deadly(checkpoint.save_file)
        checkpoint.shutil.rmtree = deadly(checkpoint.shutil.rmtree)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("again", [False, True])
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_checkpoint(again: bool, tmp_path: Path) -> None:
    """At most one interval lost; also where the step saved is there already."""
    kills = 0
    for nth in range(100):
        root = tmp_path / str(nth)
        for step in (1, 2, 3) if again else (1, 2):
            save(root, step)
        killed = die_at(nth, lambda root=root: save(root, 3))
        assert loaded_step(root) in ((2, 3) if killed else (3,))
        assert save(root, 3) is None
        assert loaded_step(root) == 3
        assert sorted(path.name for path in root.iterdir()) == ["LATEST", "step-00000002", "step-00000003"]
        kills += killed
        if not killed:
            break
    assert kills >= 15

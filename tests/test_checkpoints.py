"""Promises of weights on disk."""

import pickle

import pytest
import torch
from conftest import tiny

from scripts import checkpoints


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    checkpoints.save({"a": torch.ones(2)}, path)

    def fail(content, file):
        file.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save({"a": torch.zeros(2)}, path)
    assert torch.equal(checkpoints.load(path)["a"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read as a checkpoint"):
        checkpoints.load(path)
    torch.save({"network": Trap()}, path)
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read as a checkpoint"):
        checkpoints.load(path)
    assert not (tmp_path / "trapped").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no checkpoint at .*gone\.pt"):
        checkpoints.load(tmp_path / "gone.pt")


def test_wrapper_prefixes_are_removed_in_any_order():
    state = {"module._orig_mod.a.module.b": torch.ones(1), "_orig_mod.module.c": torch.ones(1), "d": torch.ones(1)}
    assert list(checkpoints.strip_prefixes(state)) == ["a.module.b", "c", "d"]


def test_weights_load_completely_or_not_at_all():
    source, target = tiny(), tiny()
    with torch.no_grad():
        source.mask_token.add_(1)
    checkpoints.load_network(target, {f"module.{k}": v for k, v in source.state_dict().items()}, "x.pt")
    assert torch.equal(target.mask_token, source.mask_token)

    spoilt = source.state_dict()
    del spoilt["mask_token"]
    spoilt["extra"] = torch.zeros(1)
    spoilt["decoder.embed.bias"] = torch.zeros(7)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"x\.pt do not fit this network of \d+ tensors: 1 missing \(mask_token\); 1 unexpected \(extra\); "
        r"1 of another shape \(decoder\.embed\.bias \(7,\) instead of \(32,\)\)",
    ):
        checkpoints.load_network(target, spoilt, "x.pt")
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())

"""Promises of weights on disk."""

import argparse
import pickle
import resource
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REFERENCES, ROOT, TINY_KNOBS, noise, tiny
from processes import run_module

from scripts import BertsWinMAE, weights
from scripts.weights import checkpoints


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    checkpoints.save({"a": torch.ones(2)}, path)

    def fail(content, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

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
    assert list(weights.strip_prefixes(state)) == ["a.module.b", "c", "d"]


def test_weights_load_completely_or_not_at_all():
    source, target = tiny(), tiny()
    with torch.no_grad():
        source.mask_token.add_(1)
    weights.fill(target, {f"module.{k}": v for k, v in source.state_dict().items()}, "x.pt")
    assert torch.equal(target.mask_token, source.mask_token)

    spoilt = source.state_dict()
    del spoilt["mask_token"]
    spoilt["extra"] = torch.zeros(1)
    spoilt["decoder.embed.bias"] = torch.zeros(7)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"x\.pt do not fit this network of \d+ tensors: \d+ matched \(.*…\); 1 missing \(mask_token\); "
        r"1 unexpected \(extra\); 1 reshaped \(decoder\.embed\.bias \(7,\) instead of \(32,\)\)",
    ):
        weights.fill(target, spoilt, "x.pt")
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.stem)
def test_conversion_to_the_authors_names_and_back_loses_nothing(path):
    reference = torch.load(path, weights_only=True)
    network = BertsWinMAE(**reference["config"])
    network.load_state_dict(weights.convert_reference_state_dict(reference["state_dict"]))
    back = weights.to_reference_state_dict(network)
    assert back.keys() == reference["state_dict"].keys()
    for name, value in back.items():
        torch.testing.assert_close(value, reference["state_dict"][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("strict_stem", [False, True])
@pytest.mark.parametrize("patch_size", [4, 8])
def test_every_weight_has_an_authors_name(strict_stem, patch_size):
    network = tiny(strict_stem=strict_stem, patch_size=patch_size)
    back = weights.convert_reference_state_dict(weights.to_reference_state_dict(network))
    assert all(torch.equal(back[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("patch_size", [4, 8])  # the decoder ends in a Conv3d, in a ConvTranspose3d
@torch.no_grad()
def test_a_widened_network_sees_equal_channels_as_it_saw_one(patch_size):
    narrow, wide = (tiny(in_chans=channels, patch_size=patch_size) for channels in (1, 3))
    volume, num_patches = noise(1, 1, 32, 32, 32), narrow.encoder.num_patches
    shown, close = torch.zeros(1, num_patches, dtype=torch.bool), {"rtol": 1e-4, "atol": 1e-4}
    expected = narrow(volume, masked=shown)["reconstructed_cube"].expand(-1, 3, -1, -1, -1)
    wide.load_state_dict(weights.widen(narrow.state_dict(), 3, "mean"))
    torch.testing.assert_close(
        wide(volume.expand(-1, 3, -1, -1, -1), masked=shown)["reconstructed_cube"], expected, **close
    )
    wide.load_state_dict(weights.widen(narrow.state_dict(), 3, "first"))
    noisy = torch.cat([volume, noise(1, 2, 32, 32, 32, seed=1)], dim=1)
    torch.testing.assert_close(wide(noisy, masked=shown)["reconstructed_cube"], expected, **close)


def test_widening_is_never_a_guess():
    with pytest.raises(ValueError, match="spread 'copy' must be 'mean' or 'first'"):
        weights.widen(tiny().state_dict(), 3, "copy")
    with pytest.raises(ValueError, match="only weights of one input channel can be widened; these have 2 input"):
        weights.widen(tiny(in_chans=2).state_dict(), 3, "mean")


def convert(*arguments):
    return run_module("scripts.convert", list(map(str, arguments)), ROOT)


def test_the_command_converts_a_training_state_and_back_and_accounts_for_every_tensor(tmp_path):
    config, network = tmp_path / "net.yaml", tiny()
    config.write_text(yaml.safe_dump(TINY_KNOBS))
    theirs = {f"module.{name}": value for name, value in weights.to_reference_state_dict(network).items()}
    torch.save({"model_state_dict": theirs, "epoch": 3}, tmp_path / "authors.pt")
    flags = ("--config_file", config)
    there = convert("from_authors", tmp_path / "authors.pt", tmp_path / "model.pt", *flags)
    assert there.returncode == 0, there.stderr
    assert f"{len(network.state_dict())} matched, 0 missing" in there.stdout.replace(";", ",")
    assert "   matched  decoder.head.6.bias" in there.stdout  # every tensor by name
    back = convert("to_authors", tmp_path / "model.pt", tmp_path / "back.pt", *flags)
    assert back.returncode == 0, back.stderr
    returned = torch.load(tmp_path / "back.pt", weights_only=True)["model_state_dict"]
    assert returned.keys() == {name.removeprefix("module.") for name in theirs}
    wide = convert("widen", tmp_path / "model.pt", tmp_path / "wide.pt", "--in_chans", 2, "--spread", "mean")
    assert wide.returncode == 0, wide.stderr
    tiny(in_chans=2).load_state_dict(torch.load(tmp_path / "wide.pt", weights_only=True))


def test_the_command_refuses_to_finish_when_a_weight_is_missing(tmp_path):
    config, theirs = tmp_path / "net.yaml", weights.to_reference_state_dict(tiny())
    config.write_text(yaml.safe_dump(TINY_KNOBS))
    del theirs["features.0.1.mlp.3.bias"]
    torch.save(theirs, tmp_path / "authors.pt")
    result = convert("from_authors", tmp_path / "authors.pt", tmp_path / "model.pt", "--config_file", config)
    assert result.returncode == 1
    assert "1 missing (encoder.swin.blocks.1.mlp.linear2.bias)" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "model.pt").exists()


def test_the_command_takes_knobs_of_the_network_and_refuses_others(tmp_path):
    config = tmp_path / "net.yaml"
    config.write_text(yaml.safe_dump(TINY_KNOBS))
    torch.save(weights.to_reference_state_dict(tiny(strict_stem=True)), tmp_path / "authors.pt")
    arguments = ("from_authors", tmp_path / "authors.pt", tmp_path / "model.pt", "--config_file", config)
    assert convert(*arguments, "--strict_stem", "true").returncode == 0
    refused = convert(*arguments, "--strict_stem", "maybe")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: strict_stem is 'maybe' but must be of type bool")
    refused = convert(*arguments, "--strict", "True")
    assert refused.returncode == 1
    assert "there is no knob strict of the network: it has img_size" in refused.stderr


def test_what_else_a_checkpoint_holds_is_named(tmp_path):
    torch.save({"weights": torch.ones(1), "args": argparse.Namespace(lr=1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt cannot be read .* \(it also holds argparse\.Namespace\)"):
        checkpoints.load(tmp_path / "model.pt")


def test_a_changed_byte_or_a_cut_off_end_is_noticed(tmp_path):
    path = tmp_path / "model.pt"
    checkpoints.save({"weight": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1  # within the tensor; torch alone would load it
    path.write_bytes(changed)
    with pytest.raises(
        checkpoints.DamagedCheckpointError, match=r"model\.pt is damaged \(the checksum of archive/data/0"
    ):
        checkpoints.load(path)
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(checkpoints.DamagedCheckpointError, match=r"model\.pt"):
            checkpoints.load(path)


def test_the_newest_whole_checkpoint_is_used_and_a_damaged_one_is_named_and_kept(tmp_path, caplog):
    path = tmp_path / "state.pt"
    assert checkpoints.load_newest(path) is None
    for epoch in (1, 2):
        checkpoints.save({"epoch": epoch}, path, keep_previous=True)
    assert checkpoints.load_newest(path) == {"epoch": 2}
    damaged = path.read_bytes()[:-5]
    path.write_bytes(damaged)
    assert checkpoints.load_newest(path) == {"epoch": 1}
    assert "state.pt" in caplog.text
    assert "it is kept as state.damaged.pt" in caplog.text
    assert (tmp_path / "state.damaged.pt").read_bytes() == damaged
    checkpoints.save({"epoch": 3}, path, keep_previous=True)
    path.write_bytes(damaged)
    assert checkpoints.load_newest(path) == {"epoch": 1}  # the good one was not pushed out
    checkpoints.previous(path).write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint is left to continue from"):
        checkpoints.load_newest(path)


def test_a_kill_between_the_two_renames_leaves_the_previous_one(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    checkpoints.save({"epoch": 1}, path, keep_previous=True)
    replace = Path.replace

    def killed(self, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save({"epoch": 2}, path, keep_previous=True)
    monkeypatch.undo()
    assert checkpoints.load_newest(path) == {"epoch": 1}


def test_a_full_disk_is_said_with_the_name_of_the_file_and_costs_nothing(tmp_path):
    path = tmp_path / "state.pt"
    checkpoints.save({"epoch": 1}, path, keep_previous=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*state\.pt"):
            checkpoints.save({"weight": torch.zeros(10_000)}, path, keep_previous=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoints.load(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]

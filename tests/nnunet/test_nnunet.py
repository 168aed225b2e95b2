"""Promises of nnU-Net's plans and trainer for our networks, without nnU-Net: its steps, replayed."""

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_KNOBS, noise, tiny
from monai.inferers import sliding_window_inference
from torch import nn

from scripts.mistakes import Mistake
from scripts.nnunet import build_network, make_plans, start_training, trainer_folder, training_settings, write_plans
from scripts.nnunet.plans import KNOBS, _choose_knobs
from scripts.weights import checkpoints

NETWORK = {name: value for name, value in TINY_KNOBS.items() if name in KNOBS and name != "batch_size"}


@pytest.fixture
def plans(tmp_path):
    """What nnU-Net writes of a dataset, as far as it is read: arrays z, y, x, of which it puts y first."""
    path = tmp_path / "nnUNetPlans.json"
    configuration = {
        **{"data_identifier": "nnUNetPlans_3d_fullres", "batch_size": 9, "patch_size": [56, 40, 40]},
        **{"spacing": [3.0, 2.0, 1.0], "median_image_size_in_voxels": [30.0, 20.0, 10.0]},  # y, z, x
        **{"normalization_schemes": ["ZScoreNormalization"], "architecture": {"network_class_name": "UNet"}},
    }
    path.write_text(
        json.dumps(
            {
                **{"plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO"},
                **{"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]},
                "original_median_spacing_after_transp": [3.0, 2.0, 1.0],
                "original_median_shape_after_transp": [30, 20, 10],
                "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0, "std": 2.0, "median": 3.0}},
                "configurations": {"2d": {}, "3d_fullres": configuration},
            }
        )
    )
    return path


def written(plans, name="BertsWinPlans"):
    made = json.loads((plans.parent / f"{name}.json").read_text())
    return made, made["configurations"]["3d_fullres"]


def test_axes_of_the_plans_come_in_the_order_of_pre_training(plans, capsys):
    write_plans(str(plans), modality="mr", spacing=None, **NETWORK)
    made, ours = written(plans)
    assert ours["spacing"] == made["original_median_spacing_after_transp"] == [1.0, 3.0, 2.0]  # x, y, z
    assert ours["median_image_size_in_voxels"] == made["original_median_shape_after_transp"] == [10.0, 30.0, 20.0]
    array = torch.arange(24).reshape(2, 3, 4)  # z, y, x, as readers give it
    assert array.permute(made["transpose_forward"]).permute(made["transpose_backward"]).equal(array)
    assert array.permute(made["transpose_forward"]).shape == (4, 3, 2)
    assert "overwrite_image_reader_writer" in capsys.readouterr().out


def test_plans_fit_the_window_and_keep_what_is_nnunets(plans):
    write_plans(str(plans), modality="mr", spacing=[2.0, 1.5, 1.0], name="Mine", **NETWORK)
    made, ours = written(plans, "Mine")
    assert (made["plans_name"], ours["data_identifier"]) == ("Mine", "Mine_3d_fullres")
    assert (ours["patch_size"], ours["batch_size"]) == ([32, 32, 32], 9)
    assert ours["median_image_size_in_voxels"] == [5.0, 60.0, 40.0]  # at the new spacing
    assert ours["normalization_schemes"] == ["ZScoreNormalization"]
    assert list(made["configurations"]) == ["3d_fullres"]  # others would be of other networks


def test_ct_is_clipped_and_scaled_as_in_pre_training(plans):
    write_plans(str(plans), modality="ct", spacing=None, **NETWORK)
    made, ours = written(plans)
    assert ours["normalization_schemes"] == ["CTNormalization"]
    scale = made["foreground_intensity_properties_per_channel"]["0"]
    values = torch.tensor([-3000.0, 40.0, 5000.0]).clip(scale["percentile_00_5"], scale["percentile_99_5"])
    normalised = (values - scale["mean"]) / scale["std"]  # CTNormalization
    assert normalised.tolist() == pytest.approx([-1.7125, (40 + 21.14) / 578.02, 3.4828], abs=1e-3)


def test_the_window_of_ct_is_that_of_the_weights_else_that_of_overlays(plans, tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "model.pt")
    window = {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -200, "a_max": 300, "b_min": -1, "b_max": 1}
    intensity = {"transforms": [window | {"clip": True}]}
    preprocessing = {"modality": "ct", "spacing": None, "intensity": intensity}
    (tmp_path / "model.json").write_text(json.dumps({"preprocessing": preprocessing}))
    (tmp_path / "window.yaml").write_text("intensities::ct::transforms::0::a_min: -200\n")
    for given, low, high in (
        ({"pretrained": str(tmp_path / "model.pt")}, -200, 300),
        ({"config_file": str(tmp_path / "window.yaml")}, -200, 1992),
    ):
        write_plans(str(plans), modality="ct", **given, **NETWORK)
        scale = written(plans)[0]["foreground_intensity_properties_per_channel"]["0"]
        assert (scale["percentile_00_5"], scale["percentile_99_5"]) == (low, high)
    mr = {"modality": "mr", "intensity": {"transforms": [{"_target_": "NormalizeIntensityd", "keys": "image"}]}}
    (tmp_path / "model.json").write_text(json.dumps({"preprocessing": mr}))
    write_plans(str(plans), pretrained=str(tmp_path / "model.pt"), modality="ct", **NETWORK)
    assert written(plans)[0]["foreground_intensity_properties_per_channel"]["0"]["percentile_00_5"] == -1011
    preprocessing["intensity"] = {"transforms": [window]}
    (tmp_path / "model.json").write_text(json.dumps({"preprocessing": preprocessing}))
    with pytest.raises(Mistake, match="by one ScaleIntensityRanged that clips"):
        write_plans(str(plans), pretrained=str(tmp_path / "model.pt"), modality="ct", **NETWORK)


def test_nnunets_own_plans_are_not_replaced(plans):
    before = plans.read_text()
    with pytest.raises(Mistake, match=r"nnUNetPlans.json holds plans that are not ours, and would be replaced"):
        write_plans(str(plans), modality="mr", name="nnUNetPlans", **NETWORK)
    assert plans.read_text() == before


def test_settings_of_the_network_are_read_beside_its_weights(plans, tmp_path):
    network = tiny(strict_stem=True)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    record = {"network": NETWORK | {"decoder_embed_dim": 32}, "preprocessing": {"modality": "ct", "spacing": [1, 2, 3]}}
    (tmp_path / "model.json").write_text(json.dumps(record))
    with pytest.raises(Mistake, match="by ZScoreNormalization, but weights and configs are for ct: give those for mr"):
        write_plans(str(plans), pretrained=str(tmp_path / "model.pt"))
    write_plans(str(plans), pretrained=str(tmp_path / "model.pt"), modality="ct")
    _, ours = written(plans)
    arguments = ours["architecture"]["arch_kwargs"]
    assert arguments["strict_stem"] is True
    assert (arguments["encoder_depths"], arguments["encoder_num_heads"]) == ([2], [4])
    assert (ours["patch_size"], ours["spacing"]) == ([32, 32, 32], [1, 2, 3])
    # What is said on the command line counts over it.
    knobs = _choose_knobs(str(tmp_path / "model.pt"), (), {"spacing": "null"})
    assert knobs["spacing"] is None
    checkpoints.save(network.state_dict(), tmp_path / "alone.safetensors", head={"record": json.dumps(record)})
    assert _choose_knobs(str(tmp_path / "alone.safetensors"), (), {})["spacing"] == [1, 2, 3]


def test_random_weights_have_the_default_stem_whose_stages_are_the_better_skips():
    assert _choose_knobs(None, (), {})["strict_stem"] is False
    assert _choose_knobs(None, (), {"strict_stem": "true"})["strict_stem"] is True


@pytest.mark.parametrize("content", ["[]", '{"seen": []}', '{"network": null}'])
def test_weights_with_no_record_of_their_settings_take_those_of_the_configs(tmp_path, content):
    torch.save(tiny().state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(content)
    knobs = _choose_knobs(str(tmp_path / "model.pt"), [str(ROOT / "configs" / "small.yaml")], {})
    assert (knobs["img_size"], knobs["modality"], knobs["strict_stem"]) == ([48, 64, 48], "mr", False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"img_sise": 3}, "no knob img_sise"),
        ({"patch_size": 1}, "patch_size is 1"),
        ({"img_size": [33, 32, 32]}, "divisible"),
        ({"config_file": "nowhere.yaml"}, "no config at nowhere.yaml"),
        ({"pretrained": "nowhere.pt"}, "no checkpoint at nowhere.pt"),
    ],
)
def test_plans_that_cannot_be_are_refused_before_anything_is_written(plans, wrong, message):
    with pytest.raises(Mistake, match=message):
        write_plans(str(plans), **NETWORK | wrong)
    assert [path.name for path in plans.parent.iterdir()] == ["nnUNetPlans.json"]


def test_files_that_are_no_plans_and_plans_without_volumes_are_refused(plans):
    with pytest.raises(Mistake, match="no plans of nnU-Net"):
        write_plans(str(plans.parent / "nowhere.json"))
    with pytest.raises(Mistake, match="no 3d_fullres"):
        make_plans({"configurations": {"2d": {}}}, {})
    with pytest.raises(Mistake, match="needs plans of its own"):
        training_settings({})


def test_weights_of_another_network_are_refused(plans, tmp_path):
    torch.save(tiny(encoder_embed_dim=96).state_dict(), tmp_path / "model.pt")
    with pytest.raises(Mistake, match="do not fit"):
        write_plans(str(plans), pretrained=str(tmp_path / "model.pt"), **NETWORK)


class Trainer:
    """The steps of nnU-Net's trainer that ours takes part in."""

    def __init__(self, plans, configuration, fold, dataset_json, device=None):
        self.configuration_manager = manager(plans, configuration)
        self.num_epochs, self.current_epoch, self.network = 4, 0, None
        self.enable_deep_supervision, self.initial_lr, self.weight_decay = True, 0.01, 3e-5

    def initialize(self):
        self.network = self.build_network_architecture(
            None, self.configuration_manager, 1, 3, self.enable_deep_supervision
        )
        self.optimizer, self.lr_scheduler = self.configure_optimizers()

    def run_epoch(self, data, target):
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        self.network.train()
        self.lr_scheduler.step(self.current_epoch)
        self.optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self.network(data), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.optimizer.step()
        self.current_epoch += 1
        return loss.item()


def manager(plans, configuration):
    content = plans["configurations"][configuration]
    return SimpleNamespace(configuration=content, network_arch_init_kwargs=content["architecture"]["arch_kwargs"])


@pytest.fixture
def trainer_class(monkeypatch):
    """Our trainer, found as nnU-Net finds it: its folder on the path, its file a module of no package."""
    names = ("", ".training", ".training.nnUNetTrainer", ".utilities", ".utilities.plans_handling")
    for name in (*names, ".training.nnUNetTrainer.nnUNetTrainer", ".utilities.plans_handling.plans_handler"):
        monkeypatch.setitem(sys.modules, f"nnunetv2{name}", ModuleType(f"nnunetv2{name}"))
    sys.modules["nnunetv2.training.nnUNetTrainer.nnUNetTrainer"].nnUNetTrainer = Trainer
    handler = sys.modules["nnunetv2.utilities.plans_handling.plans_handler"]
    handler.ConfigurationManager = handler.PlansManager = SimpleNamespace
    monkeypatch.syspath_prepend(str(trainer_folder()))
    monkeypatch.delitem(sys.modules, "nnunet_trainer_bertswin", raising=False)
    return importlib.import_module("nnunet_trainer_bertswin").nnUNetTrainerBertsWin


@pytest.fixture
def trained(trainer_class, plans, tmp_path):
    pretrained = tiny(strict_stem=True).encoder
    torch.save(pretrained.state_dict(), tmp_path / "encoder.pt")
    knobs = NETWORK | {"warmup_epochs": 1, "modality": "mr"}
    write_plans(str(plans), pretrained=str(tmp_path / "encoder.pt"), **knobs)
    trainer = trainer_class(plans=written(plans)[0], configuration="3d_fullres", fold=0, dataset_json={})
    trainer.initialize()
    assert all(
        value.equal(pretrained.state_dict()[name]) for name, value in trainer.network.encoder.state_dict().items()
    )
    return trainer


def test_a_training_of_nnunet_goes_from_the_weights_to_a_lower_loss(trained):
    data, target = noise(2, 1, 32, 32, 32), (noise(2, 32, 32, 32, seed=1) > 0).long()
    rates, losses = [], []
    for _ in range(trained.num_epochs):
        losses.append(trained.run_epoch(data, target))
        rates.append([group["lr"] for group in trained.optimizer.param_groups])
    assert losses[-1] < losses[0]
    decoder, encoder = zip(*rates, strict=True)
    assert decoder == pytest.approx([0.003, 0.006, 0.0045, 0.0015])  # warm-up, then a cosine
    assert encoder == pytest.approx([rate / 10 for rate in decoder])
    weights = [len(group["params"]) for group in trained.optimizer.param_groups]
    assert sum(weights) == len(list(trained.network.parameters()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_prediction_of_nnunet_builds_the_network_from_the_plans_alone_and_slides_it(trained, plans, tmp_path):
    (tmp_path / "encoder.pt").unlink()  # a prediction needs the checkpoint alone
    weights = trained.network.state_dict()
    again = type(trained).build_network_architecture(None, manager(written(plans)[0], "3d_fullres"), 1, 3, False)
    again.load_state_dict(weights)
    volume = noise(1, 1, 40, 36, 32)
    with torch.no_grad():
        predicted, expected = (
            sliding_window_inference(volume, (32, 32, 32), 1, network.eval(), overlap=0.5, mode="gaussian")
            for network in (again, trained.network)
        )
    assert predicted.shape == (1, 3, 40, 36, 32)
    assert predicted.equal(expected)


def test_the_name_in_the_plans_leads_to_the_builder(plans):
    write_plans(str(plans), modality="mr", **NETWORK)
    module, _, name = written(plans)[1]["architecture"]["network_class_name"].rpartition(".")
    assert getattr(importlib.import_module(module), name) is build_network
    with pytest.raises(Mistake, match="without deep supervision"):
        build_network(1, 3, deep_supervision=True)


def test_random_weights_train_too(plans):
    write_plans(str(plans), modality="mr", **NETWORK)
    configuration = written(plans)[1]
    network = build_network(1, 3, **configuration["architecture"]["arch_kwargs"])
    optimizer, _ = start_training(network, training_settings(configuration), 10)
    assert len(optimizer.param_groups) == 2

"""The trainer, in a folder of its own: nnU-Net imports every file beside it, each as a module of no package."""

import importlib
import sys
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

# So ours is imported by the name that it has here: bertswin_mae where it is installed, scripts in the bundle.
PACKAGE = Path(__file__).resolve().parents[2]
sys.path.append(str(PACKAGE.parent))
ours = importlib.import_module(f"{PACKAGE.name}.nnunet")
CUDA = torch.device("cuda")  # nnU-Net's default


class nnUNetTrainerBertsWin(nnUNetTrainer):  # noqa: N801 (as nnU-Net's own are called)
    """nnU-Net's training with our network, from the plans that ``write_plans`` made.

    AdamW, a warm-up and a cosine take the place of SGD, and the encoder has a rate of its own; there is no deep
    supervision. Data, augmentation, loss, validation and prediction are nnU-Net's.
    """

    # nnU-Net reads the names of these arguments, to keep them in its checkpoints.
    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings = ours.training_settings(self.configuration_manager.configuration)
        self.initial_lr, self.weight_decay = self.settings["learning_rate"], self.settings["weight_decay"]
        self.enable_deep_supervision = False

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """Build the network that the plans describe: in training and in prediction."""
        arguments = configuration_manager.network_arch_init_kwargs
        return ours.build_network(num_input_channels, num_output_channels, enable_deep_supervision, **arguments)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Fill the encoder, and make the optimiser and its schedule."""
        network = getattr(self.network, "_orig_mod", self.network)  # compiled by now, not yet distributed
        return ours.start_training(network, self.settings, self.num_epochs)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Leave the network as it is: it has one output."""

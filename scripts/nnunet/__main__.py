"""Plans and a trainer for nnU-Net.

    python -m bertswin_mae.nnunet plans PLANS.json --pretrained MODEL.pt
    python -m bertswin_mae.nnunet trainer_folder

The first writes plans for our network, the second tells the folder for `nnUNet_extTrainer`. From the repository's root,
`scripts` takes the place of `bertswin_mae`.
"""

from ..mistakes import command
from .plans import trainer_folder, write_plans

if __name__ == "__main__":
    command({"plans": write_plans, "trainer_folder": trainer_folder})

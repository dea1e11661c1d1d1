"""Train a FeatInv, evaluate it, and leave everything in one folder.

python train.py data=imagenette data.root=PATH backbone=resnet50 conditioning=pooled
"""

from featinv.cli.train import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()

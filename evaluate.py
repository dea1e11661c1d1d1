"""Score a trained model on a data set, or invert one's own photographs.

python evaluate.py checkpoint=RUN data=imagenette data.root=PATH
python evaluate.py checkpoint=RUN images='path/*.jpg' num_samples=4
"""

from featinv.cli.evaluate import main, run

__all__ = ["main", "run"]

if __name__ == "__main__":
    run()

"""`featinv-convert`: export, import, slim and push models; pack images into shards."""

import argparse
import logging
from collections.abc import Sequence

from omegaconf import OmegaConf

from featinv.checkpoints import slim
from featinv.cli.user_errors import report_user_errors
from featinv.data.packer import pack
from featinv.hub import push_to_hub
from featinv.interop.diffusers import export_model, import_checkpoint

RUN = {"metavar": "RUN", "help": "a run's folder or a checkpoint file"}
OUT = {"metavar": "OUT", "help": "folder to write, new or empty"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with code 2 for bad arguments."""
    options = vars(_parser().parse_args(arguments))
    task = options.pop("task")
    logging.basicConfig(format="%(message)s")
    with report_user_errors():
        if "sampler" in options:
            options["sampler"] = OmegaConf.to_container(OmegaConf.from_dotlist(options["sampler"]))
        written = task(**options) or options.get("folder") or options["file"]
        print(f"Wrote {written}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="featinv-convert")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("export", help="write a folder that diffusers' own classes load")
    command.set_defaults(task=export_model)
    command.add_argument("path", **RUN)
    command.add_argument("folder", **OUT)

    command = commands.add_parser("import", help="read a checkpoint of the original FeatInv code")
    command.set_defaults(task=import_checkpoint)
    command.add_argument("path", metavar="ORIGINAL.ckpt", help="the checkpoint")
    command.add_argument("folder", **OUT)
    command.add_argument(
        "--num-attention-heads",
        type=int,
        default=8,
        help="of its UNet, which the checkpoint does not tell (default: 8)",
    )
    command.add_argument(
        "--stable-diffusion",
        metavar="FOLDER_OR_ID",
        help="the Stable Diffusion that it was trained with, for the text encoder, e.g. "
        "lambda/miniSD-diffusers",
    )
    command.add_argument(
        "--backbone-weights",
        metavar="FILE",
        help="weights of the ConvNeXt, or 'timm' to download timm's",
    )

    command = commands.add_parser("slim", help="write a model's weights in half precision")
    command.set_defaults(task=slim)
    command.add_argument("path", **RUN)
    command.add_argument("file", metavar="FILE", help="the .safetensors file to write")
    command.add_argument("sampler", metavar="KEY=VALUE", nargs="*", help="new sampler values")

    command = commands.add_parser("push", help="push a run to the model hub, for FeatInv.load")
    command.set_defaults(task=push_to_hub)
    command.add_argument("run", **RUN)
    command.add_argument("repo_id", metavar="OWNER/NAME", help="the model's name on the hub")
    command.add_argument("--private", action="store_true", help="hide it from others")
    command.add_argument(
        "--stable-diffusion",
        metavar="ID",
        help="the hub's name of the Stable Diffusion that the run was trained with, if any",
    )

    command = commands.add_parser("pack", help="pack class folders of images into tar shards")
    command.set_defaults(task=_pack)
    command.add_argument("source", metavar="FOLDER", help="folder with a folder for each class")
    command.add_argument("out_prefix", metavar="PREFIX", help="shards/birds: shards/birds-0000.tar")
    for name, default, text in (
        ("size", 224, "larger images are shrunk to a shorter side of this many pixels"),
        ("samples-per-shard", 1000, "images in a shard"),
        ("quality", 95, "JPEG quality, 1 to 100"),
        ("seed", 0, "seed of the shuffling"),
    ):
        text = f"{text} (default: {default})"
        command.add_argument(f"--{name}", type=int, default=default, help=text)
    return parser


def _pack(**options: object) -> str:
    """Pack, and describe the shards."""
    shards = pack(**options)
    return f"{len(shards)} shards, {shards[0]} to {shards[-1].name}"


if __name__ == "__main__":
    main()

"""`featinv-convert`: export, import, slim and push models."""

import sys
from collections.abc import Sequence

from omegaconf import OmegaConf

from featinv.checkpoints import slim
from featinv.hub import push_to_hub
from featinv.interop.diffusers import export_model, import_checkpoint
from featinv.utils.errors import ArgumentParser, exit_code

RUN = {"metavar": "RUN", "help": "a run's folder or a checkpoint file"}
OUT = {"metavar": "OUT", "help": "folder to write, new or empty"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code, 2 for bad arguments."""
    parser = ArgumentParser(prog="featinv-convert")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("export", help="write a folder that diffusers' own classes load")
    command.set_defaults(task=export_model)
    command.add_argument("path", **RUN)
    command.add_argument("folder", **OUT)

    command = commands.add_parser("import", help="read a checkpoint of the original FeatInv code")
    command.set_defaults(task=import_checkpoint)
    command.add_argument("path", metavar="ORIGINAL.ckpt")
    command.add_argument("folder", **OUT)
    command.add_argument("--num-attention-heads", type=int, default=8)
    command.add_argument(
        "--stable-diffusion",
        metavar="FOLDER_OR_ID",
        help="whose text encoder encodes the prompt, e.g. lambda/miniSD-diffusers",
    )
    command.add_argument(
        "--backbone-weights", metavar="FILE", help="of the ConvNeXt, or 'timm' for the hub"
    )

    command = commands.add_parser("slim", help="write a model's weights in half precision")
    command.set_defaults(task=slim)
    command.add_argument("path", **RUN)
    command.add_argument("file", metavar="FILE", help="the .safetensors file to write")
    command.add_argument("sampler", metavar="KEY=VALUE", nargs="*", help="new sampler values")

    command = commands.add_parser("push", help="push a run to the model hub, for FeatInv.load")
    command.set_defaults(task=push_to_hub)
    command.add_argument("run", **RUN)
    command.add_argument("repo_id", metavar="OWNER/NAME")
    command.add_argument("--private", action="store_true")
    command.add_argument(
        "--stable-diffusion", metavar="ID", help="its id on the hub, for a model that needs it"
    )

    options = vars(parser.parse_args(arguments))
    task = options.pop("task")
    if "sampler" in options:
        options["sampler"] = OmegaConf.to_container(OmegaConf.from_dotlist(options["sampler"]))

    def convert() -> None:
        written = task(**options) or options.get("folder") or options["file"]
        print(f"Wrote {written}.")

    return exit_code(convert)


if __name__ == "__main__":
    sys.exit(main())

"""Convert models: export, import, slim, push."""

import sys
from collections.abc import Sequence

from omegaconf import OmegaConf

from featinv.checkpoints import slim
from featinv.hub import push_to_hub
from featinv.interop.diffusers import export_model, import_checkpoint
from featinv.utils.errors import ArgumentParser, exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code, 2 for bad arguments."""
    parser = ArgumentParser(prog="featinv-convert")
    commands = parser.add_subparsers(dest="command", required=True)
    to = commands.add_parser("export", help="write a folder that diffusers' own classes load")
    to.add_argument("path", metavar="RUN", help="a run's folder or a checkpoint file")
    to.set_defaults(task=export_model)
    from_ = commands.add_parser("import", help="read a checkpoint of the original FeatInv code")
    from_.add_argument("path", metavar="ORIGINAL.ckpt")
    from_.add_argument("--num-attention-heads", type=int, default=8)
    from_.add_argument(
        "--stable-diffusion",
        metavar="FOLDER_OR_ID",
        help="whose text encoder encodes the prompt, e.g. lambda/miniSD-diffusers",
    )
    from_.add_argument(
        "--backbone-weights", metavar="FILE", help="of the ConvNeXt, or 'timm' for the hub"
    )
    from_.set_defaults(task=import_checkpoint)
    for command in (to, from_):
        command.add_argument("folder", metavar="OUT", help="folder to write, new or empty")
    half = commands.add_parser("slim", help="write a model's weights in half precision")
    half.add_argument("path", metavar="RUN", help="a run's folder or a checkpoint file")
    half.add_argument("file", metavar="FILE", help="the .safetensors file to write")
    half.add_argument("sampler", metavar="KEY=VALUE", nargs="*", help="new values of the sampler")
    half.set_defaults(task=slim)
    hub = commands.add_parser("push", help="push a run to the model hub, for FeatInv.load")
    hub.add_argument("run", metavar="RUN", help="a run's folder or a checkpoint file")
    hub.add_argument("repo_id", metavar="OWNER/NAME")
    hub.add_argument("--private", action="store_true")
    hub.add_argument(
        "--stable-diffusion", metavar="ID", help="its id on the hub, for a model on it"
    )
    hub.set_defaults(task=push_to_hub)
    options = vars(parser.parse_args(arguments))
    options.pop("command")
    if "sampler" in options:
        options["sampler"] = OmegaConf.to_container(OmegaConf.from_dotlist(options["sampler"]))
    task = options.pop("task")

    def tell() -> None:
        written = task(**options) or options.get("folder") or options["file"]
        print(f"Wrote {written}.")

    return exit_code(tell)


if __name__ == "__main__":
    sys.exit(main())

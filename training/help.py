"""How `train.py --help` reads: examples, then our own options, then what the Trainer has besides."""

import argparse
from dataclasses import fields
from typing import Any, cast

from transformers import HfArgumentParser

from training.options import Options, TrainerOptions

_EXAMPLES = """examples:
  python train.py --train-file reviews.csv --output-dir artifacts/reviews
  python train.py --task token-classification --train-file train.jsonl --validation-file dev.jsonl \\
      --output-dir artifacts/entities --num-train-epochs 4 --learning-rate 2e-4
  python train.py --task image-classification --from-scratch resnet --train-file images/ --output-dir artifacts/digits
  python train.py --task sentence-similarity --base-model models/bge-small --output-dir artifacts/similar
  python train.py --train-file reviews.csv --output-dir artifacts/small --layers 3 --teacher artifacts/reviews
  torchrun --nproc-per-node 2 train.py --train-file reviews.csv --output-dir artifacts/reviews"""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the examples, and tells defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser(description: str) -> HfArgumentParser:
    """The command line of train.py."""
    # Its annotation asks for dataclass instances; it takes dataclass types.
    made = HfArgumentParser(
        cast(Any, (Options, TrainerOptions)),
        prog="train.py",
        usage="train.py --train-file FILE --output-dir FOLDER [options]; train.py --help lists them",
        # At the end nobody would find them: the Trainer has more than a hundred arguments.
        description=f"{description.strip()}\n\n{_EXAMPLES}",
        formatter_class=_Formatter,
    )
    everything = made._optionals._group_actions
    groups = {
        "what to train on, and from": {field.name for field in fields(Options)},
        "how to train": set(TrainerOptions.__annotations__),
        "besides, every argument of the Hugging Face Trainer": {action.dest for action in everything},
    }
    for action in everything:
        if len(action.option_strings) > 1 and action.dest != "help":
            # Each is taken with underscores, too.
            action.option_strings = [name for name in action.option_strings if "_" not in name]
    for title, names in groups.items():
        group = made.add_argument_group(title)
        group._group_actions += [action for action in everything if action.dest in names - {"help"}]
        everything[:] = [action for action in everything if action not in group._group_actions]
    return made

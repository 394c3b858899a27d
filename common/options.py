"""The command line: `python dpo.py [RECIPE] [--option=value …]`.

An option is a field of the page's Config. Its annotation gives its type and range, and -h prints its comment.
"""
import inspect
import os
import re
import sys
import typing
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from common.checkpoints import load_checkpoint
from common.dist import print0, print_utf8
from common.log import OTHER_LOGS
from common.option_names import check_choice, check_option
from common.option_values import Above, AtLeast, Between, check_value, convert, split_type
from engine.files import import_package, short_repr

PositiveInt = Annotated[int, AtLeast(1)]
NonNegativeInt = Annotated[int, AtLeast(0)]
PositiveFloat = Annotated[float, Above(0)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
UnitFloat = Annotated[float, Between(0, 1)]
BelowHalf = Annotated[float, Between(0, 0.5, exclude_high=True)]  # from 0.5 on, the labels say the opposite


@dataclass
class RunConfig:
    """The options that all stages share; a page's Config inherits them and may change their defaults."""
    recipe: str = "animals"             # the positional argument: a set of defaults
    data: str = "animals"               # animals, hh[/SUBSET], qa_feedback, tldr, imdb; docs/data.md: a file, hub:…
    data_dir: str = "data/files"        # where published data files are looked for before they are fetched
    init: str | None = None  # a run's or Hugging Face folder, hub:OWNER/NAME, gpt2 … gpt2-xl, scratch; None: SFT
    out: str | None = None              # the run's folder; None: out/STAGE-RECIPE, or out/STAGE-FILE for your own data
    steps: PositiveInt = 250            # optimizer steps
    batch_size: PositiveInt = 64        # examples per step, over all processes
    micro_tokens: PositiveInt = 16384   # the most tokens in a forward pass; a larger batch is accumulated
    max_len: Annotated[int, AtLeast(2)] = 64  # the most tokens of a prompt and a response together
    lr: NonNegativeFloat = 1e-3         # peak learning rate
    warmup: NonNegativeInt = 10         # steps of linear warm-up, before the cosine to 0
    weight_decay: NonNegativeFloat = 0.0  # on matrices
    grad_clip: PositiveFloat = 1.0      # the largest norm of a gradient
    n_layer: PositiveInt = 4            # with --init=scratch
    n_head: PositiveInt = 4             # with --init=scratch
    n_embd: PositiveInt = 64            # with --init=scratch
    seed: NonNegativeInt = 0            # of new weights, the order of the data, and sampling
    device: str | None = None           # cpu, cuda, cuda:1 …, mps (Apple); None: cuda if there is one
    compile: bool | None = None         # torch.compile, with flex_attention and graphs on CUDA; None: there, if large
    dtype: Literal["float32", "bfloat16"] | None = None  # of matrix products; None: bfloat16 on CUDA, else float32
    checkpoint_blocks: bool = False     # recompute the activations inside blocks: a third more work, less memory
    fsdp: bool = False                  # spread weights, gradients and optimizer over the processes (torchrun)
    log_every: PositiveInt = 10         # steps between lines on the console
    ckpt_every: PositiveInt = 50        # steps between checkpoints
    wandb: str | None = None            # log to this project of Weights & Biases too
    tensorboard: bool = False           # log for TensorBoard too, in OUT/tensorboard
    eval_n: NonNegativeInt = 500        # held-out prompts in the final table; 0: no table
    resume: bool = False                # continue from the run's last checkpoint; with --out, in its settings
    overwrite: bool = False             # start again in a folder that holds a run already


def parse(Config, RECIPES, argv=None):
    """Command line -> Config: the recipe overrides Config's defaults, and the options override both."""
    argv = sys.argv[1:] if argv is None else argv
    print_utf8()
    if "-h" in argv or "--help" in argv:
        print(usage(Config, RECIPES))
        raise SystemExit(0)
    types = typing.get_type_hints(Config, include_extras=True)
    recipe = None
    given = {}
    argv = list(argv)
    while argv:
        arg = argv.pop(0)
        if not arg.startswith("-") and os.path.isfile(arg):
            raise SystemExit(f"{short_repr(arg)[1:-1]}: a file of your own is named with --data={arg}")
        if not arg.startswith("-") and recipe is None:
            recipe = check_choice("recipe", arg, ["animals", *RECIPES])
            continue
        if not arg.startswith("--"):
            raise SystemExit(f"{short_repr(arg)[1:-1]}: options are written --name=value (-h lists them)")
        name, equals, value = arg.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        check_option(name, types)
        if not equals and types[name] is bool:
            value = "True"
        elif not equals:  # "--name value", as argparse takes it
            if not argv or argv[0].startswith("--"):
                raise SystemExit(f"--{name} needs a value: --{name}=…")
            value = argv.pop(0)
        if name == "recipe":
            recipe = check_choice("recipe", value, ["animals", *RECIPES])
        else:
            given[name] = convert(name, value, types[name])

    if recipe is None:
        recipe = default_recipe(given.get("data", ""), RECIPES)
    for option, module in OTHER_LOGS.items():
        if given.get(option):
            import_package(module, f"--{option}", option)  # an error now, not after an hour of work
    for name in ("lr", "value_lr", "reward_lr"):
        if given.get(name) == 0:
            print0(f"--{name}=0: the weights that it applies to will not change")
    defaults = {"recipe": recipe, **RECIPES.get(recipe, {})}
    if given.get("resume") and given.get("out"):  # the run's folder knows its settings
        settings = load_checkpoint(given["out"])["config"]
        defaults = {name: value for name, value in settings.items() if name in types}
    return Config(**defaults | given)


def default_recipe(data, RECIPES):
    """The recipe if none is named: your own data get one for real text, not that of a toy world."""
    if not os.path.isfile(data) and not data.startswith("hub:"):
        return "animals"
    return "hh" if "hh" in RECIPES else [*RECIPES][0]


def check_config(cfg):
    """Checks the values of a Config, which may have been made in Python; exits with one line at a bad one."""
    for name, annotation in typing.get_type_hints(type(cfg), include_extras=True).items():
        value = getattr(cfg, name)
        if value is not None:
            check_value(name, value, split_type(annotation)[1])


# --------------------------------------------------------------------------------------------------------- -h

def usage(Config, RECIPES):
    """What -h prints: every option, its default in each recipe, its comment; the page's own come first."""
    comments = {}  # of each option; a page's own comment replaces that of RunConfig
    for base in reversed(Config.__mro__[:-1]):
        comments |= re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(base), re.M)
    types = typing.get_type_hints(Config, include_extras=True)
    own = [f for f in fields(Config) if f.name not in RunConfig.__dataclass_fields__]
    shared = [f for f in fields(Config) if f.name in RunConfig.__dataclass_fields__]

    recipes = {"animals": {}, **RECIPES}
    rows = [["option", *recipes, ""]]
    for field in own + shared:
        row = ["--" + field.name]
        for name, settings in recipes.items():
            default = name if field.name == "recipe" else settings.get(field.name, field.default)
            row.append(str(default))
        comment = comments.get(field.name, "")
        choices = split_type(types[field.name])[1]
        if isinstance(choices, tuple):
            comment += f" ({', '.join(choices)})"
        rows.append([*row, comment])
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    width.append(0)  # the comment needs no padding

    script = os.path.basename(inspect.getfile(Config))
    lines = [f"python {script} [RECIPE] [--option=value …]       recipes: {', '.join(recipes)}"]
    if "hh" in recipes:
        lines.append("--data=FILE without a recipe takes the settings of hh")
    lines.append("")
    for row in rows:
        lines.append("  ".join(cell.ljust(w) for cell, w in zip(row, width)).rstrip())
    return "\n".join(lines)

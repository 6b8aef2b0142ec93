"""`moetrain record`."""

import argparse
from pathlib import Path

from moetrain.cli import arguments
from moetrain.common.errors import ConfigError

HELP = """Record which experts a model chooses for the text it is trained on, for router.replay (docs/post-train.md).

examples:
  moetrain record runs/demo --out choices.npz                     a run's newest checkpoint, the text of all its steps
  moetrain record experiment=sft model=hf model.path=DIR data.path=chat.jsonl --out choices.safetensors
                                                                  the weights that such a run would begin with
  moetrain record init_from=demo train.steps=20 --out choices.npz
"""


def add_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", nargs="?", help="the run's folder or name; none: the weights of a new run")
    arguments.add_overrides(verb)
    arguments.add_json(verb)
    arguments.add_config_dir(verb)
    verb.add_argument("--out", required=True, metavar="FILE", help="the file to write, .npz or .safetensors")


def execute(options: argparse.Namespace) -> int:
    from moetrain import checkpoint, config
    from moetrain.cli.saved_run import load_run
    from moetrain.cli.workers import run_with_workers
    from moetrain.config import HuggingFace
    from moetrain.data import replay
    from moetrain.moe.recorded import check_suffix

    out = Path(options.out)
    check_suffix(out, "--out")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out={out}: must be in an existing folder")
    if options.run is not None:
        settings = load_run(options.run, options.overrides)
    else:
        settings = config.load(options.overrides, options.config_dir)
        model = settings.model
        is_loaded = isinstance(model, HuggingFace) and model.weights == "load"
        if not is_loaded and checkpoint.find_initial(settings) is None:
            raise ConfigError("record: needs the weights of a RUN, of init_from, or of model=hf model.path=DIR")
    replay.check_routers(settings, "record")
    return run_with_workers(options, settings, "record")

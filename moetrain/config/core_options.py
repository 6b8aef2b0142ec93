"""From the sections of a configuration to the options of the core, which knows no configuration."""

from moetrain.common.extensions import CORPORA, OPTIMIZERS
from moetrain.common.registry import Options
from moetrain.config.sections.model import Model
from moetrain.config.sections.router import Planner, RouterSection
from moetrain.config.sections.running import Data
from moetrain.config.sections.training import Balance, Optim
from moetrain.moe.options import PLANNERS, ROUTERS, BalanceOptions, RouterOptions, ZeroComputeOptions


def router_options(router: RouterSection) -> RouterOptions:
    """Returns the options of the router's kind. Raises `ConfigError` for a kind or a value that there is not."""
    names = ROUTERS.options(router.name).names()
    values = {name: value for name, value in router if name in names}
    made: RouterOptions = ROUTERS.make_options(router.name, values)
    return made


def planner_options(planner: Planner) -> Options:
    """Returns the options of the planner's kind. Raises `ConfigError` for a kind or a value that there is not."""
    made: Options = PLANNERS.make_options(planner.name, planner.options)
    return made


def corpus_options(data: Data) -> Options:
    """Returns the options of the corpus's kind. Raises `ConfigError` for a kind or a value that there is not."""
    names = CORPORA.options(data.source).names()
    made: Options = CORPORA.make_options(data.source, {name: value for name, value in data if name in names})
    return made


def optimizer_options(optim: Optim) -> Options:
    """Returns the options of the optimizer's kind. Raises `ConfigError` for a kind or a value that there is not."""
    names = OPTIMIZERS.options(optim.name).names()
    made: Options = OPTIMIZERS.make_options(
        optim.name, {name: value for name, value in optim if name in names}, "optim."
    )
    return made


def zero_compute_options(model: Model, router: RouterSection) -> ZeroComputeOptions:
    """Returns how many experts compute next to nothing, and their share of the load."""
    counts = {"zero": model.zero_experts, "copy": model.copy_experts, "constant": model.constant_experts}
    return ZeroComputeOptions(**counts, tau=router.zero_compute_tau)


def balance_options(balance: Balance) -> BalanceOptions:
    """Returns the options of the router losses."""
    return BalanceOptions(**balance.model_dump())
